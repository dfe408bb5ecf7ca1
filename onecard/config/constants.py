"""Numbers that are no settings but are shared by several rooms."""

NESTED_BLOCKSIZE = 256
ROW_MULTIPLE = 64  # rows are filled to a multiple of it: products have few shapes, and each is prepared once
LOGITS_CHUNK_BYTES = 32 << 20  # bytes of logits that exist at a time, on a CPU
CACHE_PROBE = ([1, 2, 3, 4, 5, 6], [7, 8], [9])  # a prompt, its continuation, and a sampled token (infer/check.py)
FUSION_PROBE_TOKENS = 7  # that a loaded model reads to check its fused modules (hf/fusion.py)
LOSS_PROBE_TOKENS = 24  # at most, of each of two documents on which losses are compared (train/evaluate.py)
PREFILL_TOKENS = 256  # of a prompt in one pass: other requests wait for at most one pass
REFERENCE_BYTES = 16  # of an example of preferences: the reference's two log-probabilities
HEAD = "score"  # name of the linear of a classification head in transformers' decoders
NUM_SAMPLES, SAMPLE_TOKENS = 3, 96  # prompts that are answered in the report, and tokens of an answer


MLP_CHUNK_TOKENS = {"cpu": 1024, "cuda": 4096}  # of an MLP in chunks: products of so many rows are at full speed


def logits_chunk_bytes(device: str) -> int:
    """Return the bytes of logits that exist at a time on a kind of device. A GPU reads the head once a chunk. That
    takes as long as its product with about 300 rows: a chunk has room for 512 rows of 128,000 logits in 16 bits."""
    return LOGITS_CHUNK_BYTES if device == "cpu" else 4 * LOGITS_CHUNK_BYTES
