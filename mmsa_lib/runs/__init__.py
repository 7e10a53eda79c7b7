"""Runs and their records: made here, kept as files, shown on pages. Loads no torch.

Numbers reach a page only through a record: `table`, `number`, `say` and `claim` mark
every printed figure with the record and the field it came from.
"""

from mmsa_lib.files import ROOT
from mmsa_lib.runs.experiment import compare, experiment, holm, measure, save_benchmark
from mmsa_lib.runs.merge import merge
from mmsa_lib.runs.page import (
    UNDEFINED,
    ClaimError,
    Given,
    Number,
    claim,
    facts,
    given,
    number,
    recall,
    reference_table,
    run_card,
    say,
    table,
    value,
    verdict,
    verdict_of,
)
from mmsa_lib.runs.record import (
    RecordError,
    RunRecord,
    code_facts,
    committed,
    find,
    load,
    load_all,
    package_sha256,
    records_folder,
    save,
    seal,
)

__all__ = [
    "ROOT",
    "UNDEFINED",
    "ClaimError",
    "Given",
    "Number",
    "RecordError",
    "RunRecord",
    "claim",
    "code_facts",
    "committed",
    "compare",
    "experiment",
    "facts",
    "find",
    "given",
    "holm",
    "load",
    "load_all",
    "measure",
    "merge",
    "number",
    "package_sha256",
    "recall",
    "records_folder",
    "reference_table",
    "run_card",
    "save",
    "save_benchmark",
    "say",
    "seal",
    "table",
    "value",
    "verdict",
    "verdict_of",
]
