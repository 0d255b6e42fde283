"""What boto3's clients need is made once for all of a process, because each test and each command opens its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from botocore import hooks, regions, session, useragent
from botocore.client import ClientCreator
from botocore.endpoint_provider import EndpointProvider
from botocore.loaders import Loader
from botocore.model import ServiceModel


@cache
def read_once() -> None:
    """From now on until the process ends, also in processes that are forked from it.

    A client takes 7 ms of CPU then. To list botocore's folders of services again would take 16 more, to read the
    descriptions of S3 again 100, to inspect the signature of each of 150 hooks 7, and to make methods, rules of
    endpoints and names of events of the descriptions again 6.
    """
    describe_once()
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


def describe_once() -> None:
    """What botocore makes of the description of a service, and does not change, is the same for all clients."""
    load_model, methods = ClientCreator._load_service_model, ClientCreator._create_methods
    models, made = dict[Any, ServiceModel](), dict[ServiceModel, dict[str, Any]]()
    providers, names = dict[Any, EndpointProvider](), dict[str, str]()
    make_aliaser = hooks.EventAliaser.__init__

    def load_service_model(creator: ClientCreator, name: str, version: str | None = None) -> ServiceModel:
        if (name, version) not in models:
            models[name, version] = load_model(creator, name, version)
        return models[name, version]

    def create_methods(creator: ClientCreator, model: ServiceModel) -> dict[str, Any]:
        if model not in made:
            made[model] = methods(creator, model)
        return dict(made[model])  # handlers of events add others

    def provider(ruleset_data: Any, partition_data: Any, excluded_params: Any = None) -> EndpointProvider:
        key = id(ruleset_data), id(partition_data), *sorted(excluded_params or ())  # the loader keeps both
        if key not in providers:
            providers[key] = EndpointProvider(ruleset_data, partition_data, excluded_params)
        return providers[key]

    def share_names(aliaser: hooks.EventAliaser, emitter: Any, aliases: Any = None) -> None:
        make_aliaser(aliaser, emitter, aliases)
        if aliases in (None, hooks.EVENT_ALIASES):
            aliaser._alias_name_cache = names

    ClientCreator._load_service_model = load_service_model
    ClientCreator._create_methods = create_methods
    regions.EndpointProvider = provider
    hooks.EventAliaser.__init__ = share_names
