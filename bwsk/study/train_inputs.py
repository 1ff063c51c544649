"""What a training run reads, looked at before it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bwsk.errors import BwskError
from bwsk.files import read_json, sha256_file
from bwsk.study.model import TOKENIZER_FILES
from bwsk.study.params import SPLITS


@dataclass(frozen=True)
class TrainInputs:
    """What a training run reads: the folders of tokens, tokenizer and base checkpoint, and what was said beforehand.

    `census` and `memory` are the JSON files of `bwsk classify` and of `bwsk memory`; they are reported, not trained on.
    """

    tokens: Path
    tokenizer: Path
    base: Path
    census: Path
    memory: Path | None = None

    def check(self, init: str) -> tuple[dict[str, Any], dict[str, str]]:
        """base.json and the sha256 of the tokens of each split; BwskError if a file is missing or another's.

        Everything that a run reads at its end is looked at here, before it trains.
        """
        base, tokens = read_json(self.base / "base.json"), read_json(self.tokens / "tokens.json")
        recorded = {self.base / "config.json": lambda: base["config_sha256"]}
        if init == "finetune":
            recorded[self.base / "model.safetensors"] = lambda: base["sha256"]
        for split in SPLITS:
            recorded[self.tokens / f"{split}.npy"] = lambda split=split: tokens["splits"][split]["sha256"]
        for file, sha256 in recorded.items():
            try:
                known, found = sha256(), sha256_file(file)
            except (KeyError, TypeError):
                raise BwskError(f"{file}: its step recorded no sha256 of it; run that step again") from None
            except OSError as error:
                raise BwskError(f"{file}: cannot be read ({error.strerror}); run the step that makes it") from None
            if found != known:
                raise BwskError(f"{file}: is not the file that its step wrote; run that step again")
        for file, keys in ((self.census, ("s_ratio", "k_ratio")), (self.memory, ("peak_mib",))):
            values = read_json(file) if file else {}
            for key in keys if file else ():
                if not isinstance(values.get(key), (int, float)):
                    raise BwskError(f"{file}: found {values.get(key)!r} as {key}, must be a number; make it again")
        for name in TOKENIZER_FILES:
            if not (self.tokenizer / name).is_file():
                raise BwskError(f"{self.tokenizer / name}: no such file; run the tokenizer step")
        return base, {split: tokens["splits"][split]["sha256"] for split in SPLITS}
