"""trsp_fast: take whole transformer layers out of language models, fast and proven (TRSP, arXiv 2505.18232)."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trsp_fast.config import TRSPConfig as TRSPConfig
    from trsp_fast.errors import CheckFailed as CheckFailed
    from trsp_fast.errors import UserError as UserError
    from trsp_fast.models.disk_removal import remove_layers_on_disk as remove_layers_on_disk
    from trsp_fast.models.gates import LayerGates as LayerGates
    from trsp_fast.models.gates import bypassed as bypassed
    from trsp_fast.models.kv_cache import SlabCache as SlabCache
    from trsp_fast.models.removal import remove_layers as remove_layers
    from trsp_fast.models.verify import verify_removal as verify_removal
    from trsp_fast.ops import gated_residual as gated_residual
    from trsp_fast.ops import residual_norms as residual_norms
    from trsp_fast.pruner import PruneResult as PruneResult
    from trsp_fast.pruner import prune as prune
    from trsp_fast.report.perplexity import perplexity as perplexity
    from trsp_fast.select import select_layers as select_layers
    from trsp_fast.transfer import transfer as transfer

# Loaded on first use: `import trsp_fast` itself needs neither torch nor transformers.
_HOMES = {
    "CheckFailed": "trsp_fast.errors",
    "LayerGates": "trsp_fast.models.gates",
    "PruneResult": "trsp_fast.pruner",
    "SlabCache": "trsp_fast.models.kv_cache",
    "TRSPConfig": "trsp_fast.config",
    "UserError": "trsp_fast.errors",
    "bypassed": "trsp_fast.models.gates",
    "gated_residual": "trsp_fast.ops",
    "perplexity": "trsp_fast.report.perplexity",
    "prune": "trsp_fast.pruner",
    "remove_layers": "trsp_fast.models.removal",
    "remove_layers_on_disk": "trsp_fast.models.disk_removal",
    "residual_norms": "trsp_fast.ops",
    "select_layers": "trsp_fast.select",
    "transfer": "trsp_fast.transfer",
    "verify_removal": "trsp_fast.models.verify",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trsp_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
