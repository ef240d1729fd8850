"""Running bincompress's jobs on a Ray cluster: the same jobs, fingerprints and bytes, placed on other machines."""
