"""The checks of arrays against signatures, made once for each function that is written down."""

from beartype import beartype

_checked = {}


def checked(function):
    """`function` with the checks of its annotations by beartype, as jaxtyping's hook asks for them.

    A function within another is defined anew at every call of that one. Its checks would be
    compiled every time, which took a third of the time of all tests. They are those of its
    annotations alone, since jaxtyping passes a function that does nothing else.
    """
    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    kinds = code.co_argcount, code.co_posonlyargcount, code.co_flags
    annotations = repr(function.__annotations__)
    key = function.__module__, function.__qualname__, names, kinds, code.co_consts, annotations
    if key not in _checked:
        _checked[key] = beartype(function)
    return _checked[key]
