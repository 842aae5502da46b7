"""The tokenizer of CLIP, which checkpoint files do not hold: made from the vocabulary in the package."""

import gzip
import itertools
from importlib import resources

from transformers import CLIPTokenizer

VOCABULARY = "assets/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SIZE = 49408


def clip_tokenizer(*, pads_with_zero: bool, length: int) -> CLIPTokenizer:
    """Tokenizer of every CLIP text encoder with 49408 tokens.

    pads_with_zero: as open_clip and Stable Diffusion 2 pad, which is with the token "!"; else with the end token, as
        Stable Diffusion 1 does. As in their published tokenizers, a "!" in a prompt is then that same token.
    length: tokens of every prompt.
    """
    alphabet = list(byte_alphabet().values())
    merges_wanted = VOCABULARY_SIZE - 2 * len(alphabet) - 2
    with resources.files("stablesr_kit").joinpath(VOCABULARY).open("rb") as packed:
        lines = gzip.decompress(packed.read()).decode("utf-8").splitlines()
    merges = [(left, right) for left, right in map(str.split, itertools.islice(lines, 1, 1 + merges_wanted))]
    words = alphabet + [f"{letter}</w>" for letter in alphabet] + [left + right for left, right in merges]
    tokens = [*words, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        pad_token="!" if pads_with_zero else "<|endoftext|>",
        model_max_length=length,
    )


def byte_alphabet() -> dict[int, str]:
    """A printable character for each byte, in the order of CLIP's vocabulary (Radford et al. 2019, GPT-2).

    Printable bytes of Latin-1 stand for themselves, the others follow as the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
