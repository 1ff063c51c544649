"""Compare the results of two studies, or of two versions of one (`sides` loads them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Numbers of a variant that are compared, with the decimals they are shown with.
DECIMALS = {
    "final_train_loss": 4,
    "best_val_metric": 3,
    "test_metric": 3,
    "total_steps": 0,
    "wall_time_s": 1,
    "step_time_ms": 2,
    "peak_memory_mb": 1,
    "predicted_peak_memory_mb": 1,
}
TIMES = ("wall_time_s", "step_time_ms")  # measured: they differ between any two runs


@dataclass(frozen=True)
class Change:
    """One parameter, figure or verdict that differs between the two sides; None on a side that lacks it."""

    group: str
    name: str
    a: Any
    b: Any

    @property
    def relative(self) -> float | None:
        """(b - a) / a for two numbers, else None."""
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (self.a, self.b))
        return (self.b - self.a) / abs(self.a) if numbers and self.a else None


def changes(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    """What differs: parameters, data, source, environment, census, each variant's figures and weights, verdicts."""
    found = [
        change
        for group, read in (
            ("parameters", lambda results: _flat(results.get("parameters", {}))),
            ("data", _data),
            ("source", _source),
            ("environment", _environment),
            ("census", lambda results: _flat(results.get("census", {}))),
        )
        for change in _compared(group, read(a), read(b))
    ]
    for variant in {**a["variants"], **b["variants"]}:
        sides = [_figures(results["variants"].get(variant)) for results in (a, b)]
        found += _compared(variant, *sides)
    found += _compared("memory_saving", _flat(a.get("memory_saving", {})), _flat(b.get("memory_saving", {})))
    return found + _compared("claims", *(_verdicts(results) for results in (a, b)))


def summary(a: dict[str, Any], b: dict[str, Any], found: list[Change]) -> tuple[bool, str]:
    """Whether two sides are equal, and a line that summarises the comparison; `found` are their `changes`.

    Sides are equal if they differ only in measured times and the environment (device, versions). The line names only
    what both sides have, so that nothing is called equal that was not compared.
    """
    by_aspect: dict[str, list[str]] = {}
    for change in found:
        by_aspect.setdefault(_aspect(change), []).append(change.group if change.name == "weights" else change.name)
    decisive = {aspect: names for aspect, names in by_aspect.items() if aspect not in ("times", "environment")}
    if decisive:
        return False, "different: " + "; ".join(f"{aspect} ({_listed(names)})" for aspect, names in decisive.items())
    readers = {
        "parameters": lambda results: results.get("parameters"),
        "data": _data,
        "source": _source,
        "weights": lambda results: [figures["weights"] for figures in map(_figures, results["variants"].values())],
    }
    compared = [name for name, read in readers.items() if _is_full(read(a)) and _is_full(read(b))] or ["figures"]
    line = f"equal: the same {' and '.join(part for part in (', '.join(compared[:-1]), compared[-1]) if part)}"
    if steps := [change.relative for change in found if change.name == "step_time_ms" and change.relative is not None]:
        line += f"; step times differ by {100 * min(steps):+.0f} % to {100 * max(steps):+.0f} %".replace("-", "−")
    if "environment" in by_aspect:
        line += f"; made in another environment ({_listed(by_aspect['environment'])})"
    return True, line


def _aspect(change: Change) -> str:
    """The aspect that a change belongs to; measured times and verdicts on time belong to "times"."""
    if change.group in ("parameters", "data", "source", "environment", "census"):
        return change.group
    if change.name in TIMES or (change.group == "claims" and "time-overhead" in change.name):
        return "times"
    return {"claims": "verdicts"}.get(change.group, "weights" if change.name == "weights" else "figures")


def _listed(names: list[str]) -> str:
    """Names, each once, the first three of them."""
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:3]) + (f" and {len(unique) - 3} more" if len(unique) > 3 else "")


def _is_full(value: Any) -> bool:
    return bool(value) and None not in (value.values() if isinstance(value, dict) else value)


def _data(results: dict[str, Any]) -> dict[str, Any]:
    """The hashes of corpus, tokenizer, tokens and base checkpoint, and the names of the data."""
    corpus, tokens, base = (results.get(name, {}) for name in ("corpus", "tokens", "base"))
    found = {"corpus": corpus.get("name"), "tokenizer": _short(tokens.get("tokenizer_sha256"))}
    for name, part in (("corpus", corpus), ("tokens", tokens)):
        for split, figures in part.get("splits", {}).items():
            found[f"{name}.{split}"] = _short(figures.get("sha256"))
    found["base"] = base.get("name")
    return found | {f"base.{key}": _short(base.get(key)) for key in ("sha256", "config_sha256")}


def _source(results: dict[str, Any]) -> dict[str, Any]:
    """The digest of the source of each step."""
    found: dict[str, Any] = {}
    for key, value in results.get("provenance", {}).items():
        step = key.removesuffix("identity").removesuffix("source").rstrip("_") or "results"
        found[step] = _short(value.get("source") if isinstance(value, dict) else value)
    trained = _provenances(results, "source")
    return found | ({"training": ", ".join(map(str, map(_short, trained)))} if trained else {})


def _environment(results: dict[str, Any]) -> dict[str, Any]:
    """Devices and versions of the trainings."""
    versions = _provenances(results, "versions")
    names = dict.fromkeys(name for each in versions for name in each)
    found = {name: ", ".join(dict.fromkeys(str(each.get(name)) for each in versions)) for name in names}
    devices = _provenances(results, "device")
    return ({"device": ", ".join(dict.fromkeys(map(str, devices)))} if devices else {}) | found


def _provenances(results: dict[str, Any], key: str) -> list[Any]:
    """One field of the variants' provenance, each value once."""
    found = [variant.get("provenance", {}).get(key) for variant in results["variants"].values()]
    return [value for index, value in enumerate(found) if value is not None and value not in found[:index]]


def _verdicts(results: dict[str, Any]) -> dict[str, Any]:
    return {claim["id"]: claim["verdict"] for claim in results.get("claims", [])}


def _figures(variant: dict[str, Any] | None) -> dict[str, Any]:
    if variant is None:
        return {}
    sha256 = variant.get("provenance", {}).get("weights_sha256")
    return {**{key: variant.get(key) for key in DECIMALS}, "weights": _short(sha256)}


def _short(sha256: str | None) -> str | None:
    return sha256 and sha256[:12]


def _compared(group: str, a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    return [Change(group, key, a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }
