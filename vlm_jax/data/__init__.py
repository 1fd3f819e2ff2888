"""Host side, numpy only: records in, batches out."""

from vlm_jax.data.chat import Chat
from vlm_jax.data.encode import Encoder, encode
from vlm_jax.data.pipeline import Pipeline
from vlm_jax.data.sources import read_records

__all__ = ["Chat", "Encoder", "Pipeline", "encode", "read_records"]
