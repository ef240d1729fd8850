"""Numba's private API: all that the kernels rely on, in this file alone, and checked when it is imported.

It is used for four things: a cache of native code that several processes may share, names of native functions that no
two kernels have in common, native calls of a kernel by its address, and arrays at an address. Where a check fails
(PROBLEM says which), kernels are compiled by plain `njit` in every process and called from Python; a notice says so.
"""

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils

OLDEST, BELOW = (0, 62), (0, 69)  # releases that are tested (.ci/numba_versions); the bounds of pyproject.toml

_ARRAY_FIELDS = ("meminfo", "parent", "nitems", "itemsize", "data", "shape", "strides")
_THREE_INTEGERS = "i32 (i8**, {i8*, i32, i8*, i8*, i32}**, i64, i64, i64)"  # a native kernel, as LLVM's type
_REBUILD = (
    "cls", "target_context", "libdata", "fndesc", "env", "signature", "objectmode", "lifted", "typeann",
    "reload_init", "referenced_envs",
)  # fmt: skip


def find_problem() -> str | None:
    """Return the first of the expectations that this Numba does not meet, None where it meets all."""
    try:
        return next((what for what, met in _expectations() if not met), None)
    except Exception as error:  # a name that is not there, say
        return f"{type(error).__name__}: {error}"


def _expectations() -> Iterator[tuple[str, bool]]:
    from numba.core import bytecode, caching, codegen, compiler, cpu, dispatcher, funcdesc, registry
    from numba.core.runtime import _nrt_python

    yield f"release {numba.__version__}", OLDEST <= numba.version_info.short < BELOW  # type: ignore[attr-defined]
    identity: Any = bytecode.FunctionIdentity
    counted = "_unique_ids" in identity.from_function.__func__.__code__.co_names
    yield "FunctionIdentity counts with _unique_ids", counted and isinstance(identity._unique_ids, itertools.count)
    used = set(dispatcher.Dispatcher.compile.__code__.co_names)
    asked = {"_cache", "load_overload", "save_overload", "targetctx", "overloads"}
    yield "Dispatcher.compile asks self._cache", used >= asked
    yield "Dispatcher.disable_compile", hasattr(dispatcher.Dispatcher, "disable_compile")
    wrappers = ("no_cfunc_wrapper", "no_cpython_wrapper")
    yield "options for wrappers", all(hasattr(cpu.CPUTargetOptions, name) for name in wrappers)
    kept = caching.FunctionCache
    yield "FunctionCache()", _parameters(kept.__init__) == ("self", "py_func")
    yield "FunctionCache._load_overload()", _parameters(kept._load_overload) == ("self", "sig", "target_context")
    yield "FunctionCache.save_overload()", _parameters(kept.save_overload) == ("self", "sig", "data")
    yield (
        "FunctionCache's file",
        set(kept.__init__.__code__.co_names) >= {"_cache_path", "_cache_file", "filename_base"},
    )
    index = caching.IndexDataCacheFile.__init__
    yield "IndexDataCacheFile()", _parameters(index) == ("self", "cache_path", "filename_base", "source_stamp")
    yield "FunctionCache.flush()", _parameters(kept.flush) == ("self",)
    yield "CompileResultCacheImpl.reduce()", _parameters(caching.CompileResultCacheImpl.reduce) == ("self", "cres")
    yield "CompileResult._rebuild()", _parameters(compiler.CompileResult._rebuild) == _REBUILD
    yield "UserProvidedCacheLocator", caching.UserProvidedCacheLocator in caching.CacheImpl._locator_classes
    yield "config.CACHE_DIR", isinstance(numba.config.CACHE_DIR, str)  # type: ignore[attr-defined]
    yield "config.CACHE_LOCATOR_CLASSES", isinstance(numba.config.CACHE_LOCATOR_CLASSES, str)  # type: ignore[attr-defined]
    library = codegen.JITCodeLibrary
    yield "JITCodeLibrary's object code", "object" in library.serialize_using_object_code.__code__.co_consts
    yield "get_pointer_to_function()", _parameters(library.get_pointer_to_function) == ("self", "name")
    names = ("llvm_func_name", "llvm_cpython_wrapper_name")
    yield "names of native functions", all(hasattr(funcdesc.PythonFunctionDescriptor, name) for name in names)
    yield "symbols of the runtime", all(isinstance(place, int) for place in _nrt_python.c_helpers.values())
    context = registry.cpu_target.target_context
    convention = context.call_conv.get_function_type(types.void, (types.int64,) * 3)
    yield "the calling convention", str(convention) == _THREE_INTEGERS
    model = context.data_model_manager[types.Array(types.float32, 2, "C")]
    yield "the fields of an array", tuple(model._fields) == _ARRAY_FIELDS


def _parameters(function: Any) -> tuple[str, ...]:
    code = function.__code__
    return tuple(code.co_varnames[: code.co_argcount])


PROBLEM = find_problem()

# Nothing calls kernels as C callbacks, nor helpers from Python: wrappers for that took a tenth of compiling's time.
KERNEL_OPTIONS: dict[str, Any] = {} if PROBLEM else {"no_cfunc_wrapper": True}
HELPER_OPTIONS: dict[str, Any] = {} if PROBLEM else {"no_cfunc_wrapper": True, "no_cpython_wrapper": True}


def _base(name: str) -> Any:
    from numba.core import caching

    return object if PROBLEM else getattr(caching, name)


class _NativeCode(_base("CompileResultCacheImpl")):  # type: ignore[misc]
    """What the cache keeps of a compiled function: its native code, and little of what compiling others could need.

    Numba keeps LLVM's intermediate code too, for functions that call this one; reading it is half the time of loading.
    No compiled function can call a kernel: Numba does not know the class Kernel. What Numba looks for in that code when
    it loads a function, the names that the native code defines, it finds in empty functions.
    Numba also keeps what inlined functions keep their constants in; without constants, it names modules to import.
    """

    def reduce(self, compiled: Any) -> Any:
        """Return what is written to the cache."""
        (name, kind, (native, _)), *others, environments = super().reduce(compiled)
        described = compiled.fndesc
        names = _empty_functions([described.llvm_func_name, described.llvm_cpython_wrapper_name])
        return (name, kind, (native, names)), *others, tuple(kept for kept in environments if kept.consts)


def _empty_functions(names: Iterable[str]) -> bytes:
    """Return the intermediate code of functions that do nothing."""
    text = "".join(f'define void @"{name}"() {{ ret void }}\n' for name in names)
    return cast(bytes, llvmlite.binding.parse_assembly(text).as_bitcode())


class _KernelCache(_base("FunctionCache")):  # type: ignore[misc]
    """Numba's cache of one function, from which a kernel is loaded without readying the compiler.

    Numba's own first imports and registers all that a function could use, which takes 0.2 s and which compiling does
    itself; native code needs the runtime's symbols alone.
    """

    _impl_class = _NativeCode
    lock: Callable[[], None]
    missed: Callable[[], None]
    unwritable: Callable[[OSError], None]

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled function for a signature, or None where the cache has none that can be read."""
        _offer_runtime()
        # Files are replaced whole, so that they are read without a lock; who finds none waits for whoever compiles it.
        found = self._found(sig, target_context)
        if found is None:
            self.lock()
            found = self._found(sig, target_context)
        if found is None:
            with suppress(OSError):
                self.flush()
            self.missed()
        return found

    def _found(self, sig: Any, target_context: Any) -> Any:
        try:
            return self._load_overload(sig, target_context)
        except Exception:  # as many kinds as there are ways to damage a pickle, by a power cut say
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function; where the disk is full, this process alone has it."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            self.unwritable(error)


def use_cache(
    dispatcher: Any,
    function: Callable[..., Any],
    folder: Path,
    lock: Callable[[], None],
    missed: Callable[[], None],
    unwritable: Callable[[OSError], None],
) -> None:
    """Let a dispatcher look for its code in this folder before it compiles it, and write it there afterwards.

    lock: called before it is compiled, to wait for other processes; missed: called where it has to be compiled;
    unwritable: called with the error where it cannot be written.
    """
    from numba.core import caching

    config: Any = numba.config
    before = config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES
    # Set only while the cache is made: the folder is fixed then, and other users of Numba keep theirs.
    config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = str(folder), "UserProvidedCacheLocator"
    try:
        cache: Any = _KernelCache(function)
    finally:
        config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = before
    # Not by the path and the time of the function's file, which another installation of the same sources does not
    # share: the folder's name holds a hash of them all.
    cache._cache_path = str(folder)
    cache._cache_file = caching.IndexDataCacheFile(str(folder), cache._impl.filename_base, "")
    cache._impl.locator.ensure_cache_path = lambda: None
    cache.lock, cache.missed, cache.unwritable = lock, missed, unwritable
    dispatcher._cache = cache  # asked by compile(), which also writes to it


@functools.cache
def _offer_runtime() -> None:
    """Let native code find Numba's runtime, which allocates arrays.

    Numba's own way (rtsys.initialize) also compiles what compiling needs of it: 25 ms.
    """
    from numba.core.runtime._nrt_python import c_helpers

    for name, place in c_helpers.items():
        llvmlite.binding.add_symbol(name if name.startswith("_") else f"NRT_{name}", place)


@contextmanager
def numbered_from(number: int) -> Iterator[None]:
    """Let Numba number the functions that it compiles from here on; elsewhere it counts from 1 in every process.

    Native code names a function after its Python name, the types of its arguments and this number. Of two with one
    name, helpers that close over different numbers say, a process that loads what two others compiled would keep the
    first alone, and the second kernel would call the first one's.
    """
    from numba.core.bytecode import FunctionIdentity

    before = FunctionIdentity._unique_ids
    FunctionIdentity._unique_ids = itertools.count(number)
    try:
        yield
    finally:
        FunctionIdentity._unique_ids = before


def native_address(dispatcher: Any) -> int:
    """Return the address of a dispatcher's one compiled function."""
    (compiled,) = dispatcher.overloads.values()
    place = int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))
    if not place:
        raise RuntimeError(f"Numba {numba.__version__} gives no address for {compiled.fndesc.llvm_func_name}")
    return place


def call_native(context: Any, builder: Any, function: Any, arguments: list[Any]) -> None:
    """Write a call of the kernel at an address (an integer) with int64 arguments, by Numba's own convention."""
    kinds = (types.int64,) * len(arguments)
    kind = context.call_conv.get_function_type(types.void, kinds)
    pointer = builder.inttoptr(function, kind.as_pointer())
    context.call_conv.call_function(builder, pointer, types.void, kinds, arguments)


def array_at(context: Any, builder: Any, kind: Any, address: Any, shape: list[Any]) -> Any:
    """Return a C-contiguous array of a type (`kind`) at an address, which owns nothing.

    Numba's own function for it, carray, takes 0.1 s to compile at each use.
    """
    made = context.make_array(kind)(context, builder)
    item = context.get_data_type(kind.dtype)
    size = ir.Constant(ir.IntType(64), context.get_abi_sizeof(item))
    made.data = builder.inttoptr(address, item.as_pointer())
    made.shape = cgutils.pack_array(builder, shape)
    strides = [size]
    for items in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], items))
    made.strides = cgutils.pack_array(builder, strides)
    made.itemsize = size
    made.nitems = functools.reduce(lambda left, right: builder.mul(left, right, flags=["nsw"]), shape)
    return made._getvalue()


def renew_locks() -> None:
    """Give the compiler new locks, in a process that has been forked: a thread that is not there may hold the old ones.

    Where Numba or llvmlite keep theirs under other names, a child that compiles while its parent did may wait.
    """
    from llvmlite.binding import ffi
    from numba.core.compiler_lock import global_compiler_lock

    holders: tuple[Any, ...] = (global_compiler_lock, getattr(ffi.lib, "_lock", None))
    for holder in holders:
        if hasattr(holder, "_lock"):
            holder._lock = threading.RLock()
