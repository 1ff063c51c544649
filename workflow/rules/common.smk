# What all rules share: the validated parameters, the variants, and the identity of a step.
import json
import os
import sys
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

# The package beside the Snakefile, even where that of another checkout is installed: an experiment of DVC runs in a
# copy of this one, whose source it records.
sys.path.insert(0, str(workflow.basedir))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(workflow.basedir), os.environ.get("PYTHONPATH")]))

from bwsk.errors import BwskError
from bwsk.params import load_params
from bwsk.provenance import identity

# The environment that runs Snakemake runs its jobs: `bwsk` is found also when no environment is activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

try:
    PARAMS = load_params("params.yaml")
except BwskError as error:
    raise WorkflowError(str(error))
if config != yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8-sig")):
    # Jobs read params.yaml and record it with their results; a value from elsewhere would be in neither.
    raise WorkflowError("params.yaml: differs from the config given on the command line; change the file instead")
validate(config, "../schemas/params.schema.json", set_default=False)

VARIANTS = PARAMS.variant_names
SPLITS = ["train", "validation", "test"]


wildcard_constraints:
    variant="|".join(VARIANTS),
    split="|".join(SPLITS),


def params_identity(step):
    """The parameters that a step reads and the digest of its source: it reruns when either changes."""
    return json.dumps(identity(PARAMS, step), sort_keys=True)


def train_identity(wildcards):
    """The same for the training of one variant, which reads its own learning rate alone."""
    return json.dumps(identity(PARAMS, "train", wildcards.variant), sort_keys=True)


onerror:
    print("bwsk: a step failed; its log is shown above and lies in build/logs/", file=sys.stderr)
