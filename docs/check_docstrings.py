"""A hook of mkdocs: a public name without a docstring is a warning, and so an error in a strict build."""

import inspect
import logging

log = logging.getLogger("mkdocs.hooks.docstrings")


def undocumented() -> list[str]:
    """The public names of mfp, and the public methods of its classes, that have no docstring."""
    import mfp

    found = []
    for name in mfp.__all__:
        value = getattr(mfp, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        members = {f"{name}.{key}": member for key, member in vars(value).items() if _is_public_method(key, member)}
        found += [path for path, member in {name: value, **members}.items() if not inspect.getdoc(member)]
    return found


def _is_public_method(key: str, member: object) -> bool:
    kinds = (property, classmethod, staticmethod)
    return not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, kinds))


def on_pre_build(config: object) -> None:
    for path in undocumented():
        log.warning("mfp.%s has no docstring", path)
