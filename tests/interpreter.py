"""Triton's interpreter without work that comes to nothing: of small problems it was more than half."""

import dataclasses

import triton.language as tl
from triton.runtime import interpreter


def skip_idle_work() -> None:
    """Of integers, overflow is worked out but never told, as the interpreter has no asserts by default.

    And a launch puts functions in the place of the language's, as does every call within it, though they are there.
    """
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    replace = interpreter._patch_lang

    def replace_what_is_not(fn):
        languages = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return replace(fn)

    interpreter._patch_lang = replace_what_is_not
