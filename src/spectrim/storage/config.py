"""`quantization_config` of a compressed model as transformers wants to see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from spectrim.storage.table import QUANT_METHOD, Table, parse_table


class SpectrimConfig(QuantizationConfigMixin):
    """A validated `Table` behind the interface of a quantization configuration.

    Built by transformers from `config.json`, or by `attach` from a compressed model in memory.

    Raises:
        ArtifactError: the fields do not describe a result that this version can read.
    """

    quant_method: Any = QUANT_METHOD

    def __init__(self, **fields: Any):
        self.table = parse_table(fields, source="quantization_config in config.json")

    @classmethod
    def from_table(cls, table: Table) -> SpectrimConfig:
        """Wrap a table that was built in this process."""
        return cls(**table.to_json())

    @property
    def dequantize(self) -> bool:
        """Whether transformers should end with dense weights after loading."""
        return self.table.dequantize

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `config.json`."""
        return self.table.to_json()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()
