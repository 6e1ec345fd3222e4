"""Results for other programs: checked JSON of evaluations and audits, and RobustBench entries.

Checking needs the extra ``interchange`` (jsonschema); importing this package does not.
"""

from surestep.interchange._robustbench import (
    ModelInfo,
    format_eps,
    model_info_path,
    parse_eps,
    read_model_info,
    to_model_info,
    write_model_info,
)
from surestep.interchange._schema import load, schema, validate

__all__ = [
    "ModelInfo",
    "format_eps",
    "load",
    "model_info_path",
    "parse_eps",
    "read_model_info",
    "schema",
    "to_model_info",
    "validate",
    "write_model_info",
]
