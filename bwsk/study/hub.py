"""Access to the Hugging Face Hub: whether it is reachable, files of one revision, and one-line error messages.

The Hub's own client retries an unreachable host for about half a minute per file; asking once, briefly, before
anything else makes an offline machine fail (or use its cache) at once.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Literal

from bwsk.errors import BwskError

PROBE_SECONDS = 3.0


@cache
def unreachable(seconds: float = PROBE_SECONDS) -> str | None:
    """Why the Hub cannot be reached, or None if it answers; asks once per process, for at most `seconds`."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    host = constants.ENDPOINT.partition("://")[2]
    answers: list[str | None] = []

    def probe() -> None:
        from huggingface_hub.utils import get_session

        try:
            # Any answer will do, also a refusal: it shows that the host is reachable.
            get_session().head(constants.ENDPOINT, timeout=seconds)
            answers.append(None)
        except Exception as error:
            answers.append(f"{host}: {_first_line(error)}")

    # Name resolution has no timeout, so it runs in a thread that can be abandoned.
    thread = Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"{host}: no answer within {seconds:g} s"


def fetch(kind: Literal["tokenizer", "base"], repo: str, revision: str, patterns: list[str], instead: str) -> Path:
    """Folder of the Hub's cache with the files of `repo` at `revision` that match `patterns`, fetched as needed.

    Only the named files are fetched, so neither code nor pickles of the repository ever reach this machine.
    BwskError `{kind} {repo}: …; {instead}` if the Hub does not have them or cannot be reached and they are not cached.
    """
    from huggingface_hub import snapshot_download

    reason = unreachable()
    quiet_unless_terminal()
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=bool(reason))
    except Exception as error:
        raise BwskError(f"{kind} {repo}: {explain(error, revision)}; {instead}") from None
    return Path(folder)


def explain(error: Exception, revision: str) -> str:
    """What a Hub client's exception means, in a few words; never holds a token."""
    from huggingface_hub import errors

    reason = unreachable()
    if reason:
        return f"the Hub cannot be reached ({reason}) and it is not in the local cache"
    match error:
        case errors.GatedRepoError():
            return "the Hub wants a login that has access to it (hf auth login)"
        case errors.RevisionNotFoundError():
            return f"the Hub has no revision {revision!r} of it"
        case errors.RepositoryNotFoundError():
            return "the Hub has no such repository, or it is private"
        case errors.HfHubHTTPError() if error.response.status_code == 401:  # of public repositories too
            return "the Hub does not accept the login that is set (hf auth login, or unset HF_TOKEN)"
        case errors.HFValidationError():
            return "not a repository id of the form owner/name"
    return f"the Hub did not deliver it ({_first_line(error)})"


def quiet_unless_terminal() -> None:
    """Disable progress bars of the Hub client, `datasets` and `transformers` where a log would get every redraw."""
    from huggingface_hub.utils import disable_progress_bars

    if sys.stderr.isatty():
        return
    disable_progress_bars()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
