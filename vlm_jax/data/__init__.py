"""Data on the host, numpy only: from records to batches."""

from vlm_jax.data.encode import Encoder, encode
from vlm_jax.data.pipeline import Pipeline
from vlm_jax.data.records.sources import read_records
from vlm_jax.data.text.chat import Chat

__all__ = ["Chat", "Encoder", "Pipeline", "encode", "read_records"]
