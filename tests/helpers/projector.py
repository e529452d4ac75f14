"""A tiny random vision encoder for llama.cpp's multimodal library, and images for it."""

import base64
import struct
import zlib

import numpy as np
from gguf import GGUFWriter

SIDE, PATCH, WIDTH, FF, LAYERS, HEADS = 42, 14, 32, 64, 3, 4
N_ROWS = (SIDE // PATCH) ** 2  # of an image


def write_projector(path, n_embd=64, seed=0):
    """Write a CLIP encoder with LLaVA 1.5's projector, as `mmproj` files have it."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(str(path), "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    for key, value in {
        "image_size": SIDE,
        "patch_size": PATCH,
        "embedding_length": WIDTH,
        "feed_forward_length": FF,
        "block_count": LAYERS,
        "projection_dim": n_embd,
        "attention.head_count": HEADS,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.25, 0.25, 0.25])

    def add(name, *shape, scale=1.0):
        values = scale * rng.standard_normal(shape) / np.sqrt(shape[-1])
        writer.add_tensor(name, values.astype(np.float32))

    add("v.patch_embd.weight", WIDTH, 3, PATCH, PATCH)
    add("v.position_embd.weight", N_ROWS, WIDTH)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            add(f"v.blk.{layer}.{name}.weight", WIDTH, WIDTH)
            add(f"v.blk.{layer}.{name}.bias", WIDTH)
        for name in ("ln1", "ln2"):
            writer.add_tensor(f"v.blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
            add(f"v.blk.{layer}.{name}.bias", WIDTH)
        add(f"v.blk.{layer}.ffn_up.weight", FF, WIDTH)
        add(f"v.blk.{layer}.ffn_up.bias", FF)
        add(f"v.blk.{layer}.ffn_down.weight", WIDTH, FF)
        add(f"v.blk.{layer}.ffn_down.bias", WIDTH)
    add("mm.0.weight", n_embd, WIDTH, scale=3.0)
    add("mm.0.bias", n_embd)
    add("mm.2.weight", n_embd, n_embd, scale=3.0)
    add("mm.2.bias", n_embd)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def image_url(seed):
    """A random PNG image as a data URL."""
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE * 3), np.uint8)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines))
    return "data:image/png;base64," + base64.b64encode(png + chunk(b"IEND", b"")).decode()
