"""The inputs of a training run, checked before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from bwsk.errors import BwskError
from bwsk.files import read_json, sha256_file
from bwsk.study.model import TOKENIZER_FILES
from bwsk.study.params import SPLITS


@dataclass(frozen=True)
class TrainInputs:
    """Inputs of a training run: the folders of tokens, tokenizer and base checkpoint, and the pre-training reports.

    The reports `census` and `memory` are the JSON files of `bwsk classify` and `bwsk memory`; results repeat them.
    """

    tokens: Path
    tokenizer: Path
    base: Path
    census: Path
    memory: Path | None = None

    def check(self, init: str) -> tuple[dict[str, Any], dict[str, str]]:
        """Return base.json and the sha256 of each split's tokens; BwskError if a file is missing or was replaced.

        This includes everything that a run reads only at its end.
        """
        base, tokens = read_json(self.base / "base.json"), read_json(self.tokens / "tokens.json")
        # File -> the JSON document that has its sha256, and the keys that lead to it.
        recorded: dict[Path, tuple[Any, ...]] = {self.base / "config.json": (base, "config_sha256")}
        if init == "finetune":
            recorded[self.base / "model.safetensors"] = (base, "sha256")
        for split in SPLITS:
            recorded[self.tokens / f"{split}.npy"] = (tokens, "splits", split, "sha256")
        for file, where in recorded.items():
            try:
                known, found = reduce(getitem, where), sha256_file(file)
            except (KeyError, TypeError):
                raise BwskError(f"{file}: its step recorded no sha256 of it; run that step again") from None
            except OSError as error:
                raise BwskError(f"{file}: cannot be read ({error.strerror}); run the step that makes it") from None
            if found != known:
                raise BwskError(f"{file}: is not the file that its step wrote; run that step again")
        for report, keys in ((self.census, ("s_ratio", "k_ratio")), (self.memory, ("peak_mib",))):
            values = read_json(report) if report else {}
            for key in keys if report else ():
                if not isinstance(values.get(key), (int, float)):
                    raise BwskError(f"{report}: found {values.get(key)!r} as {key}, must be a number; make it again")
        for name in TOKENIZER_FILES:
            if not (self.tokenizer / name).is_file():
                raise BwskError(f"{self.tokenizer / name}: no such file; run the tokenizer step")
        return base, {split: tokens["splits"][split]["sha256"] for split in SPLITS}
