"""What does a store's name lead to: the files of a folder, or the objects below an fsspec URL?"""

from bincompress.store.files import Files, LocalFiles, is_local


def files_at(url: str) -> Files:
    """Return the files of a path or an fsspec URL; nothing is looked at yet."""
    if is_local(url):
        return LocalFiles(url)
    from bincompress.store.objects import ObjectFiles  # and fsspec, only where it is asked for

    return ObjectFiles(url)
