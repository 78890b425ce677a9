"""Reading arrays and plain records out of a pickle, without running anything that the file asks for.

A pickle is a program: it names callables and says what to call them with. Here every name it may use is
answered by a stand-in of this module that checks its arguments and builds an inert value; no function or
class of numpy, torch or the file's own modules is ever handed to the unpickler. Names outside the closed
list are refused. A first pass over the opcodes refuses what can hurt without any name at all: memo indices
and nested tuples that would exhaust memory, time or the C stack.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Self, cast

import numpy as np

from specmoe.errors import SpecmoeError

__all__ = ["Array", "Record", "load_restricted", "load_with_storages"]

# Elements of a tuple, nested ones counted as often as they appear. Hashing a tuple visits all of them, by
# recursion on the C stack, which a few thousand levels overflow.
_LARGEST_TUPLE = 5_000
_MOST_DIMENSIONS = 8
# Extension codes bypass find_class; out-of-band buffers and Python 2 strings do not occur in such files.
_REFUSED_OPCODES = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "PERSID", "INST", "OBJ"} | {
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
}
_NUMPY_CODES = {"i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Inert:
    """A value that the pickle's BUILD opcode cannot change."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise SpecmoeError("it tries to change something that it may only use")


class Array:
    """An array found in a pickle.

    Attributes:
        stored: the numbers, a view of the bytes in the file; bfloat16 as its bits in uint16.
        bfloat16: whether ``stored`` is that.
    """

    __slots__ = ("bfloat16", "stored")

    def __init__(self, stored: np.ndarray | None = None, bfloat16: bool = False) -> None:
        self.stored = np.zeros(0, np.float32) if stored is None else stored
        self.bfloat16 = bfloat16

    def numpy(self) -> np.ndarray:
        """The array; bfloat16 widened to float32."""
        if self.bfloat16:
            return (self.stored.astype(np.uint32) << 16).view(np.float32)
        return self.stored

    def __setstate__(self, state: object) -> None:
        _version, shape, dtype, fortran, raw = cast(tuple[Any, ...], state)
        self.stored = _from_bytes(raw, dtype, shape, "F" if fortran else "C")


class Record:
    """An instance of the one admitted class: its attributes, without its code.

    Attributes:
        fields: attribute name → value.
    """

    __slots__ = ("fields",)

    fields: dict[str, Any]

    def __new__(cls) -> Self:
        """Make an empty record; unpickling calls no ``__init__``."""
        record = object.__new__(cls)
        record.fields = {}
        return record

    def __setstate__(self, state: object) -> None:
        """Take over what was pickled as the object's attributes."""
        # Classes with __slots__ give a pair: what is in __dict__, what is in the slots.
        for part in state if isinstance(state, tuple) else (state,):
            if part is not None:
                self.fields.update({str(name): value for name, value in cast(dict[Any, Any], part).items()})


def load_restricted(path: Path, record_class: str) -> Any:
    """Unpickle a file that holds builtins, numpy arrays, torch tensors and records of one class.

    Args:
        path: the file, of any pickle protocol. record_class: name of the class whose instances come back as
            :class:`Record`, whatever module it was pickled under.

    Returns:
        The pickled value; numpy arrays and torch tensors as :class:`Array`, ordered dicts as dicts.

    Raises:
        SpecmoeError: the file cannot be read, is empty, truncated or no pickle, or asks for anything else;
            the message names what.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if not start:
                raise SpecmoeError("it is empty; write it again with pickle.dump")
            if start == b"PK\x03\x04":
                raise SpecmoeError("it was written by torch.save; load it there and write it with pickle.dump")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _load(cast(IO[bytes], content), _Unpickler, record_class)
    except OSError as error:
        raise SpecmoeError(f"{path} cannot be read: {error.strerror or error}") from error
    except SpecmoeError as error:
        raise SpecmoeError(f"{path} is refused: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything, also MemoryError and RecursionError
        reason = _printable(str(error) or type(error).__name__)
        raise SpecmoeError(f"{path} is damaged or no pickle ({reason}); write it again with pickle.dump") from error


def load_with_storages(stream: IO[bytes], storage: Callable[[str, str, int], np.ndarray]) -> Any:
    """Unpickle what ``torch.save`` pickles, whose tensors' numbers lie outside of the pickle.

    Args:
        stream: the pickle. storage: gives the numbers for a storage's key, numpy code ("bf16" for bfloat16) and length.

    Returns:
        As :func:`load_restricted`.

    Raises:
        SpecmoeError: it asks for anything that is not admitted. Other exceptions: it is damaged.
    """

    class Unpickler(_ArchiveUnpickler):
        def persistent_load(self, pid: Any) -> Array:
            found = super().persistent_load(pid)
            return Array(storage(found.key, found.code, found.count), found.code == "bf16")

    return _load(stream, Unpickler)


def _printable(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")[:120]


def _load(stream: IO[bytes], unpickler: type[_Unpickler], record_class: str = "") -> Any:
    start = stream.tell()
    _check_opcodes(stream, persistent=unpickler is not _Unpickler)
    stream.seek(start)
    return unpickler(stream, record_class).load()


def _check_opcodes(stream: IO[bytes], *, persistent: bool) -> None:
    """Follow the pickle machine's stack, with the expanded size of tuples in place of values."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    for count, (opcode, value, _) in enumerate(pickletools.genops(stream)):
        name, argument = opcode.name, cast(int, value)
        if name in _REFUSED_OPCODES or (name == "BINPERSID" and not persistent):
            raise SpecmoeError(f"it uses the pickle opcode {name}, which routing data has no use for")
        if name == "MARK":
            marks.append(len(stack))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if argument > count:
                raise SpecmoeError(f"its memo index {argument} is beyond anything that it holds")
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            before = opcode.stack_before
            below_mark = before.index(pickletools.markobject) if pickletools.markobject in before else None
            if below_mark is None:
                below, popped = 0, stack[len(stack) - len(before) :]
            else:
                below, popped = below_mark, stack[marks.pop() :]
            if len(stack) < len(popped) + below or (below_mark is None and len(popped) < len(before)):
                raise pickle.UnpicklingError("it takes more from its stack than it put there")
            del stack[len(stack) - len(popped) - below :]
            size = 1 + sum(popped) if "TUPLE" in name else 1
            if size > _LARGEST_TUPLE:
                raise SpecmoeError(f"it nests tuples into more than {_LARGEST_TUPLE:,} elements")
            stack.extend(size for _ in opcode.stack_after)


# --- stand-ins for what a pickle may name ------------------------------------------------------------


class _Callable(_Inert):
    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _Name(_Inert):
    """A class that is passed as an argument only."""

    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        self.code = code


class _Dtype:
    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: object) -> None:
        _version, order, sub_array, names, fields = cast(tuple[Any, ...], state)[:5]
        if order not in ("<", ">", "=", "|") or not (sub_array is names is fields is None):
            raise SpecmoeError("it holds a numpy array of records; plain numbers are expected")
        self.order = order

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


def _dtype(code: object, *_: object) -> _Dtype:
    if code == "b1":
        return _Dtype("u1")  # a byte other than 0 and 1 must not become a bool
    if not isinstance(code, str) or not (code in _NUMPY_CODES or re.fullmatch(r"U[1-9]\d{0,3}", code)):
        what = "a numpy object array" if str(code).startswith("O") else f"numpy values of type {_printable(str(code))}"
        raise SpecmoeError(f"it holds {what}; plain numbers are expected")
    return _Dtype(code)


def _from_bytes(raw: object, dtype: object, shape: object, order: object) -> np.ndarray:
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _Dtype):
        raise SpecmoeError("it holds a numpy array that is not made of bytes")
    sizes = _sizes(shape)
    kind = dtype.numpy()
    if math.prod(sizes) * kind.itemsize != len(raw):
        raise SpecmoeError(f"an array declares the shape {sizes} and holds {len(raw)} bytes")
    return np.frombuffer(raw, kind).reshape(sizes, order="F" if order == "F" else "C")


def _sizes(shape: object) -> tuple[int, ...]:
    sizes = shape if isinstance(shape, tuple) else (shape,)
    if len(sizes) > _MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 48 for n in sizes):
        raise SpecmoeError("an array declares an impossible shape")
    return cast(tuple[int, ...], sizes)


def _reconstruct(subtype: object, *_: object) -> Array:
    if subtype is not _NDARRAY:
        raise SpecmoeError("it holds an array of a class other than numpy.ndarray")
    return Array()


def _scalar(dtype: object, raw: object) -> Any:
    return _from_bytes(raw, dtype, (1,), "C")[0].item()


def _frombuffer(raw: object, dtype: object, shape: object, order: object, *_: object) -> Array:
    return Array(_from_bytes(raw, dtype, shape, order))


def _rebuild_tensor(storage: object, offset: int, size: object, stride: object, *_: object) -> Array:
    sizes, strides = _sizes(size), _sizes(stride)
    if not isinstance(storage, Array) or len(sizes) != len(strides) or type(offset) is not int or offset < 0:
        raise SpecmoeError("it holds a torch tensor without its storage")
    flat = storage.stored
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if math.prod(sizes) and (last >= len(flat) or math.prod(sizes) > len(flat)):
        raise SpecmoeError(f"a torch tensor declares the shape {sizes} and holds {len(flat)} numbers")
    if not math.prod(sizes):
        return Array(np.zeros(sizes, flat.dtype), storage.bfloat16)
    steps = tuple(step * flat.itemsize for step in strides)
    return Array(np.lib.stride_tricks.as_strided(flat[offset:], sizes, steps, writeable=False), storage.bfloat16)


def _torch_size(sizes: object) -> tuple[int, ...]:
    # Only whole numbers: a tuple made by a call escapes the count of nested tuples.
    return _sizes(tuple(sizes) if isinstance(sizes, list | tuple) else sizes)


def _rebuild_parameter(tensor: object, *_: object) -> object:
    return tensor


def _storage_from_bytes(data: object) -> Array:
    """A torch storage, as ``pickle.dump`` of a tensor embeds it: five small pickles, then the raw numbers.

    torch's own reader runs the embedded pickles with whatever they name; this one admits storage types.
    """
    if not isinstance(data, bytes):
        raise SpecmoeError("it holds a torch storage that is not made of bytes")
    stream = io.BytesIO(data)
    if _load(stream, _StorageUnpickler) != _LEGACY_MAGIC:
        raise SpecmoeError("it holds a torch storage of an unknown format")
    _protocol, _system, storage, keys = (_load(stream, _StorageUnpickler) for _ in range(4))
    if not isinstance(storage, _StorageReference) or keys != [storage.key]:
        raise SpecmoeError("it holds a torch storage of an unknown format")
    count = int.from_bytes(stream.read(8), "little")
    dtype = np.dtype("<u2" if storage.code == "bf16" else f"<{storage.code}")
    if count != storage.count or len(data) - stream.tell() != count * dtype.itemsize:
        raise SpecmoeError("a torch storage declares another length than it holds")
    return Array(np.frombuffer(data, dtype, offset=stream.tell()), storage.code == "bf16")


class _StorageReference(_Inert):
    __slots__ = ("code", "count", "key")

    def __init__(self, code: str, key: str, count: int) -> None:
        self.code, self.key, self.count = code, key, count


def _encode(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise SpecmoeError("it encodes something other than latin-1 text")
    return text.encode("latin-1")


def _bytearray(*arguments: object) -> bytearray:
    # bytearray(n) would allocate n bytes.
    if arguments and isinstance(arguments[0], str):
        return bytearray(_encode(*arguments))
    if len(arguments) > 1 or not all(isinstance(argument, bytes) for argument in arguments):
        raise SpecmoeError("it makes a bytearray of something other than bytes")
    return bytearray(*cast(tuple[bytes, ...], arguments))


def _record(cls: object, base: object, _state: object) -> Record:
    # What protocols 0 and 1 call for every object: copyreg._reconstructor(cls, object, None).
    if cls is not Record or base is not _OBJECT:
        raise SpecmoeError("it asks for copyreg._reconstructor on a class that is not admitted")
    return Record()


_NDARRAY, _OBJECT = _Name("ndarray"), _Name("object")
_ORDERED_DICT = _Callable(lambda *pairs: dict(*pairs))
_ADMITTED: Mapping[str, Any] = {
    "numpy.ndarray": _NDARRAY,
    "numpy.dtype": _Callable(_dtype),
    "numpy._core.multiarray._reconstruct": _Callable(_reconstruct),
    "numpy._core.multiarray.scalar": _Callable(_scalar),
    "numpy._core.numeric._frombuffer": _Callable(_frombuffer),
    "torch._utils._rebuild_tensor": _Callable(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Callable(_rebuild_tensor),
    "torch._utils._rebuild_parameter": _Callable(_rebuild_parameter),
    "torch.storage._load_from_bytes": _Callable(_storage_from_bytes),
    "torch.Size": _Callable(_torch_size),
    "collections.OrderedDict": _ORDERED_DICT,
    "builtins.object": _OBJECT,
    "builtins.set": _Callable(set),
    "builtins.frozenset": _Callable(frozenset),
    "builtins.complex": _Callable(complex),
    "builtins.bytes": _Callable(lambda: b""),  # how protocols 0 to 2 spell empty bytes
    "builtins.bytearray": _Callable(_bytearray),
    "copyreg._reconstructor": _Callable(_record),
    "_codecs.encode": _Callable(_encode),
}
_STORAGES: Mapping[str, Any] = {
    f"torch.{kind}Storage": _Name(code)
    for kind, code in {
        "Float": "f4",
        "Double": "f8",
        "Half": "f2",
        "BFloat16": "bf16",
        "Long": "i8",
        "Int": "i4",
        "Short": "i2",
        "Char": "i1",
        "Byte": "u1",
        "Bool": "u1",
    }.items()
}
# Older spellings of the same modules.
_RENAMED = {
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
}


class _Unpickler(pickle.Unpickler):
    admitted: Mapping[str, Any] = _ADMITTED

    def __init__(self, stream: IO[bytes], record_class: str) -> None:
        super().__init__(stream)
        self._record_class = record_class

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if self._record_class and global_name.rpartition(".")[2] == self._record_class:
            return Record
        name = f"{_RENAMED.get(module_name, module_name)}.{global_name}"
        if name not in self.admitted:
            raise SpecmoeError(f"it asks for {_printable(name)}, which is not admitted; it may be made to run code")
        return self.admitted[name]

    def persistent_load(self, pid: Any) -> Any:
        raise SpecmoeError("it refers to something outside of itself")


class _StorageUnpickler(_Unpickler):
    admitted = _STORAGES

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", _Name(code=code), str(key), _, int(count), *view) if view in ([], [None]) and count >= 0:
                return _StorageReference(code, key, count)
            case _:
                raise SpecmoeError("it holds a torch storage of an unknown format")


def _rebuild_typed(
    storage: object, offset: int, size: object, stride: object, _grad: object, _hooks: object, dtype: object, *_: object
) -> object:
    """A tensor of a type that has no storage type of its own: its storage is bytes."""
    if not isinstance(storage, Array) or not isinstance(dtype, _Name):
        raise SpecmoeError("it holds a torch tensor without its storage")
    return _rebuild_tensor(Array(storage.stored.view(np.dtype(f"<{dtype.code}"))), offset, size, stride)


_ARCHIVED: Mapping[str, Any] = {
    **_ADMITTED,
    **_STORAGES,
    "torch._utils._rebuild_tensor_v3": _Callable(_rebuild_typed),
    "torch.storage.UntypedStorage": _Name("u1"),
    **{f"torch.uint{size}": _Name(f"u{size // 8}") for size in (16, 32, 64)},
}


class _ArchiveUnpickler(_StorageUnpickler):
    admitted = _ARCHIVED
