"""What boto3's clients need is made once for all of a process, because each test and each command opens its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from botocore import hooks, session, useragent
from botocore.loaders import Loader


@cache
def read_once() -> None:
    """From now on until the process ends, also in processes that are forked from it.

    A client takes 19 ms of CPU then. To list botocore's folders of services again would take 16 more, to read the
    descriptions of S3 again 100, and to inspect the signature of each of 150 hooks 7.
    """
    create, found = session.create_loader, dict[str | None, dict[Any, Any]]()
    inspect_signature = hooks.accepts_kwargs

    def create_loader(paths: str | None = None) -> Loader:
        loader = create(paths)
        loader._cache = found.setdefault(paths, {})  # type: ignore[attr-defined]
        return loader

    def accepts_kwargs(hook: Callable[..., Any]) -> Any:
        code = getattr(hook, "__code__", None)
        return code.co_flags & inspect.CO_VARKEYWORDS if code else inspect_signature(hook)

    session.create_loader = create_loader
    hooks.accepts_kwargs = accepts_kwargs
    # Each request makes its User-Agent of a dozen words again: an eighth of its CPU.
    useragent.sanitize_user_agent_string_component = cache(useragent.sanitize_user_agent_string_component)
