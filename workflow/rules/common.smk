# What all rules share: the validated parameters, the variants, and the identity of a step.
import json
import os
import shlex
import sys
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod
from snakemake.utils import validate

# The package beside the Snakefile, even where that of another checkout is installed: an experiment of DVC runs in a
# copy of this one, whose source it records.
sys.path.insert(0, str(workflow.basedir))

# Folders of outputs are made by Snakemake, and none may be writable by everybody: `bwsk check` would refuse it.
os.umask(os.umask(0o022) | 0o002)

from bwsk.errors import BwskError
from bwsk.locks import hold_study, require_posix, sign_study
from bwsk.study.params import load_params
from bwsk.study.provenance import identity

# Jobs run with the Python that runs Snakemake, activated or not; under `--sdm conda` with the environment's.
CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
shell.prefix(
    f"export PYTHONPATH={shlex.quote(str(workflow.basedir))}; "
    + ("" if CONDA else f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"; ')
    + 'bwsk() {{ python -m bwsk "$@"; }}; '
)

try:
    require_posix("the workflow")
    PARAMS = load_params("params.yaml")
except BwskError as error:
    raise WorkflowError(str(error))
if config != yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8-sig")):
    # Jobs read params.yaml and record it with their results; a value from elsewhere would be in neither.
    raise WorkflowError("params.yaml: differs from the config given on the command line; change the file instead")
validate(config, "../schemas/params.schema.json", set_default=False)

# The study as seen from the user's shell, for paths in messages: Snakemake itself has changed to the study by now.
STUDY = Path(os.path.relpath(Path.cwd(), os.environ.get("PWD")))
# The same in a rule's message, of which Snakemake fills in what is in braces.
SHOWN = Path(str(STUDY).replace("{", "{{").replace("}", "}}"))
VARIANTS = PARAMS.variant_names
SPLITS = ["train", "validation", "test"]


wildcard_constraints:
    variant="|".join(VARIANTS),
    split="|".join(SPLITS),


def params_identity(step):
    """The parameters that a step reads and the digest of its code: it reruns when either changes."""
    return json.dumps(identity(PARAMS, step), sort_keys=True)


def memory_identity(wildcards):
    """The same for the prediction of one mode's memory."""
    return params_identity(f"memory-{wildcards.mode}")


def train_identity(wildcards):
    """The same for the training of one variant, which reads its own learning rate alone."""
    return json.dumps(identity(PARAMS, "train", wildcards.variant), sort_keys=True)


def initial_weights(wildcards):
    """Fine-tuning starts from the base weights; from scratch only the base's configuration counts."""
    return "build/base/model.safetensors" if wildcards.variant.startswith("finetune") else []


def local_files(section, names):
    """Files of a section's local directory, as inputs: an edit of them reruns the step. None for other sources."""
    if section.source != "directory":
        return []
    # What is missing is for the step to say: it knows what would do instead.
    return [str(file) for file in (Path(section.path) / name for name in names) if file.is_file()]


def memory_mode(wildcards):
    """The engine that a mode trains with; bwsk-analyzed trains with the conventional one, which has no budget."""
    if wildcards.mode != "bwsk-reversible":
        return "conventional"
    return f"reversible --budget={shlex.quote(str(PARAMS.train.budget))}"


def memory_prediction(wildcards):
    """The prediction for a variant's mode."""
    return f"build/analysis/memory-{PARAMS.split_variant(wildcards.variant)[1]}.json"


# Before Snakemake looks at its own locks: those that a killed one has left behind go, those of a live one get a name.
if workflow.is_main_process:
    if user := hold_study(Path(".snakemake")):
        print(f"bwsk: this study is in use by {user}; wait for its end", file=sys.stderr)


onstart:
    sign_study(Path(".snakemake"))


onerror:
    print(f"bwsk: a step failed; its log is shown above and lies in {STUDY / 'build/logs'}", file=sys.stderr)
