"""From a model's name to its structure: Hub id, directory or `config.json` -> config -> module on the meta device.

No weights are loaded and none are allocated: the module holds shapes and dtypes only (`torch.device("meta")`), so a
7-billion-parameter architecture costs megabytes. Code that is hosted beside a config (`auto_map`) is never executed:
an architecture that the installed transformers does not contain is refused.
"""

from __future__ import annotations

import copy
import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bwsk import _compat
from bwsk._compat import from_config
from bwsk.errors import BwskError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig


def load_config(source: Any, revision: str | None = None) -> PreTrainedConfig:
    """Read the config of a model.

    `source` is a Hub id (`google-t5/t5-small`, or `google-t5/t5-small@<revision>`), a local directory that holds a
    `config.json`, a path to such a file, or a config (returned as it is). `revision` is a Hub branch, tag or commit.
    Raises `BwskError` when there is no such config, when it is not one, or when only remote code could build it.
    """
    from transformers import PreTrainedConfig

    if isinstance(source, PreTrainedConfig):
        return source
    if not isinstance(source, (str, PathLike)):
        raise BwskError(
            f"{type(source).__name__}: not a model; give a module, a transformers config, a Hub id or a path"
        )
    text = str(source)
    path = Path(text)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise BwskError(f"{text}: a directory without config.json; give a model directory or a config.json")
    elif not path.is_file():
        if text.endswith(".json") or text.startswith((".", "/", "~")):
            raise BwskError(f"{text}: no such file; give a config.json, a model directory or a Hub id")
        path = _from_hub(text, revision)
    return _parse(text, path)


def _from_hub(source: str, revision: str | None) -> Path:
    """Path of the Hub model's config.json in the local cache, downloaded if need be."""
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    name, at, pinned = source.partition("@")
    if at and revision and pinned != revision:
        raise BwskError(f"{source}: names revision {pinned} but revision {revision} was given too; give one of them")
    revision = revision or pinned or None
    instead = "give a local directory or a config.json instead"
    try:
        # An unreachable host would be retried for half a minute with a line of chatter each time.
        return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=not _hub_resolves()))
    except hub.HFValidationError:
        raise BwskError(f"{source}: neither a file, a directory nor a valid Hub id; {instead}") from None
    except hub.GatedRepoError:
        raise BwskError(f"{name}: gated on the Hub; ask for access and log in, or {instead}") from None
    except hub.RevisionNotFoundError:
        raise BwskError(f"{name}: the Hub has no revision {revision!r}; check it, or {instead}") from None
    except hub.RepositoryNotFoundError:
        raise BwskError(
            f"{name}: no such model on the Hub and no such local path; check the id, or {instead}"
        ) from None
    except hub.LocalEntryNotFoundError:
        raise BwskError(f"{name}: not in the local cache and the Hub cannot be reached; {instead}") from None
    except hub.EntryNotFoundError:
        raise BwskError(f"{name}: its repository holds no config.json; {instead}") from None
    except (OSError, ValueError, RuntimeError, hub.HfHubHTTPError) as error:
        raise BwskError(f"{name}: the Hub did not deliver config.json ({type(error).__name__}); {instead}") from None


def _hub_resolves() -> bool:
    """Whether the Hub's host name resolves; a proxy resolves names itself, so with one this says yes."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub.constants import ENDPOINT

    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def _parse(source: str, path: Path) -> PreTrainedConfig:
    from bwsk._compat import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BwskError(
            f"{source}: not a readable JSON config ({one_line(error)}); give a transformers config"
        ) from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise BwskError(f"{source}: has no 'model_type', so it is no transformers config; give a model's config.json")
    kind = fields["model_type"]
    if kind not in CONFIG_MAPPING_NAMES:
        if "auto_map" in fields:
            raise BwskError(f"{source}: model type {kind!r} exists as remote code only, which is never executed")
        raise BwskError(
            f"{source}: the installed transformers does not know model type {kind!r}; update it or check it"
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(fields)
    except Exception as error:  # every config class validates in its own way
        raise BwskError(f"{source}: not a valid {kind} config: {one_line(error)}") from None


def model_class(config: PreTrainedConfig) -> type[nn.Module]:
    """The class that `config` is for: the one it names in `architectures`, else its task's class in transformers."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None and from_config(found, None) is not None:
            return found
        if getattr(config, "auto_map", None):
            raise BwskError(
                f"{config.model_type}: architecture {name!r} exists as remote code only, which is never executed"
            )
        raise BwskError(f"{config.model_type}: the installed transformers has no class {name!r}; update it or check it")
    heads = list(_compat.HEADS)
    if getattr(config, "is_decoder", False):
        heads[2], heads[3] = heads[3], heads[2]
    for head in heads:
        name = getattr(_compat, head).get(config.model_type)
        if isinstance(name, (list, tuple)):
            name = name[0]
        if name is not None and hasattr(transformers, name):
            return getattr(transformers, name)
    raise BwskError(
        f"{config.model_type}: transformers has no model class for it; name one in the config's architectures"
    )


def build(
    config: PreTrainedConfig, *, device: str | torch.device = "meta", attn_implementation: str | None = None
) -> nn.Module:
    """A new model of `config`, in training mode; on the default device "meta" it has shapes but no storage.

    On a real device the weights are freshly initialised. `attn_implementation` is "eager" or "sdpa" (default: what
    transformers picks). The config is copied, never changed. Raises `BwskError` when the class cannot be built.
    """
    import torch

    cls = model_class(config)
    construct = from_config(cls)
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with torch.device(device):
            return construct(copy.deepcopy(config), **extra).train()
    except Exception as error:  # model constructors fail in as many ways as there are models
        raise BwskError(
            f"{config.model_type}: {cls.__name__} cannot be built from this config: {one_line(error)}"
        ) from None


def load(source: Any, *, revision: str | None = None, attn_implementation: str | None = None) -> tuple[nn.Module, str]:
    """Meta-device model and its display name, for whatever `load_config` accepts; a module is passed through."""
    from torch import nn

    if isinstance(source, nn.Module):
        return source, type(source).__name__
    config = load_config(source, revision)
    model = build(config, attn_implementation=attn_implementation)
    return model, type(model).__name__


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
