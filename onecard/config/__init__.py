"""Every setting, its default and its check. No other module has its own default for a setting.

The field names are those of transformers, peft and bitsandbytes, with the same meaning.
A YAML file and the command line's flags set the same fields; an unknown key is an error.
"""

from onecard.config.constants import (
    CACHE_PROBE,
    FUSION_PROBE_TOKENS,
    HEAD,
    LOGITS_CHUNK_BYTES,
    LOSS_PROBE_TOKENS,
    MLP_CHUNK_TOKENS,
    NESTED_BLOCKSIZE,
    NUM_SAMPLES,
    PREFILL_TOKENS,
    REFERENCE_BYTES,
    ROW_MULTIPLE,
    SAMPLE_TOKENS,
    logits_chunk_bytes,
)
from onecard.config.data import (
    FORMATS_OF,
    ROLES,
    SFT_FORMATS,
    Data,
    DataConfig,
    DataFormat,
    FormatConfig,
    ReadConfig,
    RowConfig,
    Source,
    TrainOn,
)
from onecard.config.evaluation import EvaluationData, EvaluationSettings, eval_key
from onecard.config.export import CALIBRATED, CalibrationConfig, ExportConfig, Folder, GgufConfig
from onecard.config.infer import SamplingConfig, ServeConfig
from onecard.config.lora import LoraSettings, TrainFor
from onecard.config.optim import ADAMW, Optim, OptimSettings
from onecard.config.preference import LossSettings, PreferenceSettings
from onecard.config.quant import (
    BLOCKSIZES,
    BNB_TYPES,
    MXFP4_STORAGE,
    QUANT_TYPES,
    BaseCalibration,
    ComputeDtype,
    LoadConfig,
    QuantConfig,
    QuantizeConfig,
    QuantType,
    StoredConfig,
)
from onecard.config.strict import Strict, is_loopback, make_config, parse_bytes
from onecard.config.studio import StudioConfig
from onecard.config.train import MemorySettings, PlanConfig, TrainConfig

__all__ = [
    "ADAMW",
    "BLOCKSIZES",
    "BNB_TYPES",
    "CACHE_PROBE",
    "CALIBRATED",
    "FORMATS_OF",
    "FUSION_PROBE_TOKENS",
    "HEAD",
    "LOGITS_CHUNK_BYTES",
    "LOSS_PROBE_TOKENS",
    "MLP_CHUNK_TOKENS",
    "MXFP4_STORAGE",
    "NESTED_BLOCKSIZE",
    "NUM_SAMPLES",
    "PREFILL_TOKENS",
    "QUANT_TYPES",
    "REFERENCE_BYTES",
    "ROLES",
    "ROW_MULTIPLE",
    "SAMPLE_TOKENS",
    "SFT_FORMATS",
    "BaseCalibration",
    "CalibrationConfig",
    "ComputeDtype",
    "Data",
    "DataConfig",
    "DataFormat",
    "EvaluationData",
    "EvaluationSettings",
    "ExportConfig",
    "Folder",
    "FormatConfig",
    "GgufConfig",
    "LoadConfig",
    "LoraSettings",
    "LossSettings",
    "MemorySettings",
    "Optim",
    "OptimSettings",
    "PlanConfig",
    "PreferenceSettings",
    "QuantConfig",
    "QuantType",
    "QuantizeConfig",
    "ReadConfig",
    "RowConfig",
    "SamplingConfig",
    "ServeConfig",
    "Source",
    "StoredConfig",
    "Strict",
    "StudioConfig",
    "TrainConfig",
    "TrainFor",
    "TrainOn",
    "eval_key",
    "is_loopback",
    "logits_chunk_bytes",
    "make_config",
    "parse_bytes",
]
