"""A GPT-2, a BERT and a ViT written the ordinary Linen way: they know nothing of this project.

Each has a function that gives its parameters from a transformers model's tensors, and the table of
its layers' names there. Letters: B batch, T token, D model, N heads, H head dim.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class GPT2Attention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        B, T, D = x.shape
        qkv = nn.Dense(3 * D, name="c_attn")(x).reshape(B, T, 3, self.heads, D // self.heads)
        q, k, v = (qkv[:, :, i] for i in range(3))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / (D // self.heads) ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones((1, 1, T, T), bool)), scores, -1e30)
        mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v).reshape(B, T, D)
        return nn.Dense(D, name="c_proj")(mixed)


class GPT2MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(4 * x.shape[-1], name="c_fc")(x)
        return nn.Dense(x.shape[-1], name="c_proj")(nn.gelu(hidden, approximate=True))


class GPT2Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, _=None):
        x = x + GPT2Attention(self.heads, name="attn")(nn.LayerNorm(1e-5, name="ln_1")(x))
        x = x + GPT2MLP(name="mlp")(nn.LayerNorm(1e-5, name="ln_2")(x))
        return x, None


class GPT2(nn.Module):
    """int [B, T] to logits [B, T, V], the head tied. form: of the layers."""

    vocabulary: int = 96
    width: int = 32
    layers: int = 2
    heads: int = 4
    positions: int = 16
    form: str = "loop"  # or "remat", "scan", "scan, remat", "scan with dropout's rng"

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocabulary, self.width, name="wte")
        places = nn.Embed(self.positions, self.width, name="wpe")
        x = embed(tokens) + places(jnp.arange(tokens.shape[1]))[None]
        block = nn.remat(GPT2Block) if "remat" in self.form else GPT2Block
        if self.form.startswith("scan"):
            rngs = {"params": True, "dropout": True} if "rng" in self.form else {"params": True}
            block = nn.scan(block, variable_axes={"params": 0}, split_rngs=rngs, length=self.layers)
            x, _ = block(self.heads, name="h")(x, None)
        else:
            for i in range(self.layers):
                x, _ = block(self.heads, name=f"h_{i}")(x)
        return embed.attend(nn.LayerNorm(1e-5, name="ln_f")(x))


GPT2_NAMES = [(r"h_(\d+)\.(.*)", r"transformer.h.\1.\2"), (r"(.*)", r"transformer.\1")]


def _tree(tensors, rename):
    """Return nested parameters; rename(name, tensor) -> (path, leaf) or None."""
    tree = {}
    for name, tensor in tensors.items():
        found = rename(name, np.asarray(tensor))
        if found is None:
            continue
        *parents, last = found[0].split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = found[1]
    return tree


def gpt2_params(tensors):
    def rename(name, tensor):
        if name == "lm_head.weight":
            return None
        *module, kind = name.removeprefix("transformer.").replace("h.", "h_").split(".")
        if module[-1] in ("wte", "wpe"):
            kind = "embedding"
        elif module[-1].startswith("ln"):
            kind = {"weight": "scale"}.get(kind, kind)
        else:
            kind = {"weight": "kernel"}.get(kind, kind)  # Conv1D: [in, out] as it is
        return "/".join((*module, kind)), tensor

    return _tree(tensors, rename)


def stacked(params, count, prefix="h_", name="h"):
    """Return the parameters of layers prefix0, prefix1, ... as one stack, as nn.scan holds them."""
    layers = [params[f"{prefix}{i}"] for i in range(count)]
    rest = {key: value for key, value in params.items() if not key.startswith(prefix)}
    return {**rest, name: jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}


class BertLayer(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        mixed = nn.MultiHeadDotProductAttention(self.heads, name="attention")(x)
        x = nn.LayerNorm(1e-12, name="attention_norm")(x + mixed)
        hidden = nn.gelu(nn.Dense(2 * x.shape[-1], name="intermediate")(x), approximate=False)
        out = nn.Dense(x.shape[-1], name="output")(hidden)
        return nn.LayerNorm(1e-12, name="output_norm")(x + out)


class Bert(nn.Module):
    """int [B, T] to hidden states [B, T, D]."""

    vocabulary: int = 96
    width: int = 32
    layers: int = 2
    heads: int = 4
    positions: int = 16

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, self.width, name="word_embeddings")(tokens)
        x += nn.Embed(2, self.width, name="token_type_embeddings")(jnp.zeros_like(tokens))
        places = nn.Embed(self.positions, self.width, name="position_embeddings")
        x += places(jnp.arange(tokens.shape[1]))[None]
        x = nn.LayerNorm(1e-12, name="norm")(x)
        for i in range(self.layers):
            x = BertLayer(self.heads, name=f"layer_{i}")(x)
        return x


BERT_NAMES = [
    (r"layer_(\d+)\.attention\.out", r"encoder.layer.\1.attention.output.dense"),
    (r"layer_(\d+)\.attention\.(\w+)", r"encoder.layer.\1.attention.self.\2"),
    (r"layer_(\d+)\.(intermediate|output)", r"encoder.layer.\1.\2.dense"),
    (r"(\w+_embeddings)", r"embeddings.\1"),
]


def bert_params(tensors, heads=4):
    modules = {
        "embeddings.LayerNorm": "norm",
        "attention.output.LayerNorm": "attention_norm",
        "attention.output.dense": "attention/out",
        "attention.self": "attention",
        "output.LayerNorm": "output_norm",
        "intermediate.dense": "intermediate",
        "output.dense": "output",
    }

    def rename(name, tensor):
        if name.startswith("pooler."):
            return None
        module, kind = name.rsplit(".", 1)
        for theirs, ours in modules.items():
            module = module.replace(theirs, ours)
        module = module.removeprefix("embeddings.").replace("encoder.layer.", "layer_")
        module = module.replace(".", "/")
        if kind == "weight":
            norm, embedding = "norm" in module, "embeddings" in module
            kind = "scale" if norm else "embedding" if embedding else "kernel"
        part = module.split("/")[-1]
        if kind == "kernel":
            tensor = tensor.T
        if part in ("query", "key", "value"):
            tensor = tensor.reshape(*tensor.shape[:-1], heads, -1)
        if part == "out" and kind == "kernel":
            tensor = tensor.reshape(heads, -1, tensor.shape[-1])
        return f"{module}/{kind}", tensor

    return _tree(tensors, rename)


class ViTBlock(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        D = x.shape[-1]
        y = nn.LayerNorm(1e-6, name="norm1")(x)
        # Fused, by an einsum whose kernel is [3, N, H, D]: output axes first.
        shape = (3, self.heads, D // self.heads, D)
        q, k, v = nn.Einsum(shape, "btd,cnhd->cbtnh", name="qkv")(y)
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / (D // self.heads) ** 0.5
        mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
        x = x + nn.DenseGeneral(D, axis=(-2, -1), name="proj")(mixed)
        y = nn.Dense(2 * D, name="fc1")(nn.LayerNorm(1e-6, name="norm2")(x))
        return x + nn.Dense(D, name="fc2")(nn.gelu(y, approximate=False))


class ViT(nn.Module):
    """float [B, H, W, 3] to features [B, H / patch, W / patch, D]."""

    width: int = 32
    layers: int = 2
    heads: int = 4
    patch: int = 4

    @nn.compact
    def __call__(self, images):
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, name="projection")(images)
        B, rows, columns, D = x.shape
        places = self.param("position", nn.initializers.normal(), (1, rows * columns, D))
        x = x.reshape(B, rows * columns, D) + places
        for i in range(self.layers):
            x = ViTBlock(self.heads, name=f"block_{i}")(x)
        return x.reshape(B, rows, columns, D)


VIT_NAMES = [
    (r"block_(\d+)\.(qkv|proj)", r"encoder.layer.\1.attention.\2"),
    (r"block_(\d+)\.(fc\d)", r"encoder.layer.\1.mlp.\2"),
]


def vit_params(tensors, heads=4):
    """Of transformers' VitDet without windows, whose attention has `qkv` and `proj`."""

    def rename(name, tensor):
        if name == "embeddings.position_embeddings":
            return "position", tensor[:, 1:]  # its class token's is not used
        module, kind = name.rsplit(".", 1)
        module = module.removeprefix("embeddings.").replace("encoder.layer.", "block_")
        module = module.replace("attention.", "").replace("mlp.", "").replace(".", "/")
        part = module.split("/")[-1]
        if part.startswith("norm"):
            kind = {"weight": "scale"}.get(kind, kind)
        elif kind == "weight":
            kind = "kernel"
            if part == "qkv":
                tensor = tensor.reshape(3, heads, -1, tensor.shape[-1])
            elif part == "proj":
                tensor = tensor.T.reshape(heads, -1, tensor.shape[0])
            elif part == "projection":
                tensor = tensor.transpose(2, 3, 1, 0)
            else:
                tensor = tensor.T
        elif part == "qkv":
            tensor = tensor.reshape(3, heads, -1)
        return f"{module}/{kind}", tensor

    return _tree(tensors, rename)
