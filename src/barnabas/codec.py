"""Values to bytes and back: one pair of functions per topic, chosen once at declaration."""

import typing
from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any

import msgspec

from barnabas.errors import DeclarationError, whole
from barnabas.message import Key

Encode = Callable[[Any], bytes]
Decode = Callable[[bytes], Any]
_encode = msgspec.json.Encoder().encode


def is_pydantic(type_: Any) -> bool:
    """Whether `type_` is a pydantic model (asked without importing pydantic)."""
    return isinstance(type_, type) and hasattr(type_, "__pydantic_validator__") and hasattr(type_, "model_validate_json")


def make_codec(owner: str, type_: Any, codec: str) -> tuple[Encode, Decode]:
    """The encoder and decoder for values of `type_`. `codec` is "json" or "raw" (bytes as they are)."""
    if codec == "raw":
        if type_ not in (None, bytes):
            raise DeclarationError(f'{owner}: codec="raw" carries bytes, not {type_!r}; leave the type out or use codec="json"')
        return _raw, _raw
    if codec != "json":
        raise DeclarationError(f'{owner}: codec={codec!r} is unknown; use "json" or "raw"')
    if is_pydantic(type_):
        return (lambda value: value.model_dump_json().encode()), type_.model_validate_json
    try:
        return _encode, msgspec.json.Decoder(known(Any if type_ is None else type_)).decode
    except TypeError as error:
        how = 'use a msgspec Struct, a dataclass, a TypedDict, a pydantic model or a plain type, or bytes with codec="raw"'
        raise DeclarationError(f"{owner}: type {type_!r} cannot be decoded from JSON ({error}); {how}") from None


def known(type_: Any) -> Any:
    """The type, if msgspec can decode all of it. It would take any class as a custom one, and then fail every message:
    so that is a TypeError here."""
    if type_ is not Any:
        from msgspec import inspect  # not for whoever declares nothing

        seen: set[int] = set()
        nodes: list[Any] = [inspect.type_info(type_)]
        while nodes:
            node = nodes.pop()
            if id(node) in seen or not isinstance(node, inspect.Type | inspect.Field):
                continue
            seen.add(id(node))
            if isinstance(node, inspect.CustomType) and node.cls is not object:
                alone = ", as pydantic models are read on their own only" * is_pydantic(node.cls)
                raise TypeError(f"there is no way to read {node.cls.__name__}{alone}")
            for name in node.__struct_fields__:
                value = getattr(node, name)
                nodes += value if isinstance(value, tuple | list) else [value]
    return type_


_KINDS = {"IntType": "number", "FloatType": "number", "StrType": "text", "BoolType": "yes or no", "NoneType": "null"}
_KINDS |= {"ListType": "array"} | dict.fromkeys(("DictType", "StructType", "DataclassType", "TypedDictType"), "object")


def misfit(stored: Any, wanted: Any) -> tuple[bool, list[str]]:
    """Whether no JSON of the first type can be read as the second; and the fields that this must have and the first has not. As
    far as that is known."""
    from msgspec import inspect

    try:
        nodes = [inspect.type_info(Any if type_ is None or is_pydantic(type_) else type_) for type_ in (stored, wanted)]
    except TypeError:  # a return annotation may say anything
        return False, []
    kinds = [{_KINDS.get(type(each).__name__, "") for each in getattr(node, "types", (node,))} for node in nodes]
    kinds = [{""} if getattr(node, "array_like", False) else kind for node, kind in zip(nodes, kinds, strict=True)]
    has, must = [getattr(node, "fields", ()) for node in nodes]
    lacks = {field.encode_name for field in must if field.required} - {field.encode_name for field in has}
    return not (kinds[0] & kinds[1] or "" in kinds[0] | kinds[1]), sorted(lacks) if has else []


def _raw(value: Any) -> bytes:
    if type(value) is bytes:
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    raise TypeError(f'codec="raw" carries bytes, not {type(value).__name__}')


def make_key(owner: str, type_: Any, key: str | Callable[[Any], Any] | None) -> Callable[[Any], Key] | None:
    """The function that takes a value's key: from a field's name, or the caller's own function. None: no key."""
    if key is None:
        return None
    if callable(key):
        return lambda value: as_key(key(value))
    if not isinstance(key, str):
        raise DeclarationError(f"{owner}: key={key!r} is neither a field's name nor a function of the value")
    names = field_names(type_)
    if names is not None and key not in names:
        raise DeclarationError(f"{owner}: key={key!r} is not a field of {type_.__name__}; its fields are {', '.join(names)}")
    origin = typing.get_origin(type_) or type_
    mapping = origin is None or typing.is_typeddict(type_) or (isinstance(origin, type) and issubclass(origin, dict))
    get: Callable[[Any], Any] = itemgetter(key) if mapping else attrgetter(key)
    if names is not None and typing.get_type_hints(type_).get(key) is str:
        return get
    return lambda value: as_key(get(value))


def as_key(key: Any) -> Key:
    """A key as it is stored: text and bytes as they are, None for none, numbers as their decimal text."""
    if key is None or type(key) is str or type(key) is bytes:
        return key
    if whole(key) or isinstance(key, str) or (hasattr(key, "hex") and hasattr(key, "int")):  # the last: a UUID
        return str(key)
    if isinstance(key, bytes):
        return bytes(key)
    raise TypeError(f"a key is text, bytes, a whole number, a UUID or None, not {type(key).__name__}: give key= a function")


def field_names(type_: Any) -> list[str] | None:
    """The fields of a Struct, dataclass, TypedDict or pydantic model; None where they are not known."""
    if type_ is None or typing.get_origin(type_) is not None or not isinstance(type_, type):
        return None
    if is_pydantic(type_):
        return list(type_.model_fields)  # type: ignore[attr-defined]
    if issubclass(type_, msgspec.Struct) or hasattr(type_, "__dataclass_fields__") or typing.is_typeddict(type_):
        return list(typing.get_type_hints(type_))
    return None
