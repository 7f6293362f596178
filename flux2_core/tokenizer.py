"""Prompts to token ids for the two text encoder families.

The vocabulary comes from tokenizer.json, from Mistral's tekken.json, or from Qwen's vocab.json with merges.txt.

Reads JSON only: no code and no pickle of a model repository is ever run. Nothing is fetched.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .files import MAX_JSON_BYTES, read_json_object, read_limited

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Family = Literal["mistral", "qwen3"]

# BFL's system message for FLUX.2 [dev], with the line break that it was trained with.
# Source: github.com/black-forest-labs/flux2, src/flux2/system_messages.py
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
MAX_TOKENIZER_BYTES = 128 * 2**20


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How one family wraps, marks and pads a prompt."""

    template: str
    """What the family's official chat template makes of a prompt, for tokenizers that bring no template."""
    markers: tuple[str, ...]
    """Special tokens of the template; a tokenizer without them belongs to another model."""
    pad_token: str
    padding_side: Literal["left", "right"]


CHAT_FORMATS: dict[Family, ChatFormat] = {
    "mistral": ChatFormat(
        template=f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]{{prompt}}[/INST]",
        markers=("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
        pad_token="<pad>",
        padding_side="left",
    ),
    "qwen3": ChatFormat(
        template="<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        markers=("<|im_start|>", "<|im_end|>"),
        pad_token="<|endoftext|>",
        padding_side="right",
    ),
}

# Special tokens of tekken files that do not list their own (format v3), in the order of their ids.
# Source: github.com/mistralai/mistral-common, tokens/tokenizers/tekken.py
TEKKEN_DEFAULT_SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)

# What Qwen3's tokenizer.json holds beside vocab.json and merges.txt. Ids of special tokens follow the vocabulary.
# Source: huggingface.co/Qwen/Qwen3-4B, tokenizer.json
QWEN_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
QWEN_ADDED_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompts:
    """A batch of prompts, padded to one length."""

    ids: Tensor
    """int64 ``[B, max_tokens]``."""
    attention_mask: Tensor
    """int64 ``[B, max_tokens]``, 0 on padding."""
    num_cut: tuple[int, ...]
    """Tokens cut off the end of each prompt, template included."""


class PromptTokenizer:
    """Wraps prompts in the family's chat template and turns them into padded token ids.

    Args:
        backend: the tokenizer itself.
        family: decides template and padding side.
        chat_template: a Jinja template from the tokenizer's files; None takes the family's own text.
        pad_token: used where the vocabulary lacks the family's pad token.

    Raises:
        ValueError: the vocabulary lacks the family's special tokens or a pad token.
    """

    def __init__(
        self, backend: Tokenizer, family: Family, *, chat_template: str | None = None, pad_token: str | None = None
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.family: Family = family
        self.format = CHAT_FORMATS[family]
        self.chat_template = chat_template
        missing = [marker for marker in self.format.markers if backend.token_to_id(marker) is None]
        if missing:
            raise ValueError(f"no tokenizer of a {family} text encoder: it lacks the tokens {' '.join(missing)}")
        pad_id = backend.token_to_id(self.format.pad_token)
        if pad_id is None and pad_token is not None:
            pad_id = backend.token_to_id(pad_token)
        if pad_id is None:
            raise ValueError(f"the tokenizer has no pad token; it needs {self.format.pad_token}")
        self.pad_id: int = pad_id

    @property
    def max_id(self) -> int:
        """The largest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values())

    def format_prompt(self, prompt: str) -> str:
        """The text that is tokenized: the prompt inside the chat template."""
        if self.family == "mistral":
            prompt = prompt.replace("[IMG]", "")  # the placeholder of a picture, of which there is none
        if self.chat_template is None:
            return self.format.template.replace("{prompt}", prompt)
        return self._render(prompt)

    def _render(self, prompt: str) -> str:
        # transformers compiles the template in Jinja's immutable sandbox.
        from transformers.utils.chat_template_utils import render_jinja_template

        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        if self.family == "mistral":
            messages = [
                {"role": "system", "content": [{"type": "text", "text": SYSTEM_MESSAGE}]},
                {"role": "user", "content": [{"type": "text", "text": prompt}]},
            ]
        try:
            rendered, _ = render_jinja_template(
                conversations=[messages],
                chat_template=self.chat_template,
                add_generation_prompt=self.family == "qwen3",
                enable_thinking=False,
                bos_token="<s>" if self.family == "mistral" else "",
            )
        except Exception as error:  # Jinja's errors and whatever the file's template raises
            raise ValueError(f"the tokenizer's chat template does not work: {error}") from error
        return rendered[0]

    def __call__(self, prompts: Sequence[str], max_tokens: int) -> TokenizedPrompts:
        """Tokenizes, cuts at the end and pads to ``max_tokens``."""
        rows, masks, num_cut = [], [], []
        for prompt in prompts:
            text = self.format_prompt(prompt)
            # A template that writes <s> itself must not get a second one from the tokenizer.
            ids = self.backend.encode(text, add_special_tokens=not text.startswith("<s>")).ids
            kept = ids[:max_tokens]
            padding = [self.pad_id] * (max_tokens - len(kept))
            mask, blank = [1] * len(kept), [0] * len(padding)
            left = self.format.padding_side == "left"
            rows.append(padding + kept if left else kept + padding)
            masks.append(blank + mask if left else mask + blank)
            num_cut.append(len(ids) - len(kept))
        return TokenizedPrompts(ids=torch.tensor(rows), attention_mask=torch.tensor(masks), num_cut=tuple(num_cut))


def find_tokenizer(
    family: Family,
    *,
    explicit: Path | None,
    embedded: bytes | None,
    directories: Iterable[Path],
    repository: str,
    vocab_size: int,
    last_directories: Iterable[Path] = (),
) -> PromptTokenizer:
    """The tokenizer of a text encoder.

    Looks at the explicit path alone if there is one; else in the weights file, then in ``directories``, then in the
    local Hugging Face cache, then in ``last_directories``. A tokenizer of another model that lies in one of them is
    passed over.

    Args:
        explicit: folder or file the user named.
        embedded: content of a ``tekken_model`` tensor.
        directories: where a tokenizer may lie beside the weights.
        repository: Hugging Face repository it comes from.
        vocab_size: rows of the token embedding; larger ids do not fit.
        last_directories: where a tokenizer of the family may lie that did not come with the weights.

    Raises:
        ValueError: there is none, or the one that was named does not fit.
    """
    if explicit is not None:
        return _checked(_read_explicit(Path(explicit), family), vocab_size, str(explicit))
    if embedded is not None:
        return _checked(PromptTokenizer(read_tekken(embedded), family), vocab_size, "the tekken_model of the weights")
    misfits = []
    for directory in [*directories, *_cached_directories(repository), *last_directories]:
        if not _tokenizer_file(directory):
            continue
        try:
            return _checked(read_tokenizer(directory, family), vocab_size, str(directory))
        except ValueError as error:
            misfits.append(str(error))
    hint = f" (passed over: {'; '.join(misfits)})" if misfits else ""
    raise ValueError(
        f"no tokenizer for this {family} text encoder{hint}: put tokenizer.json and tokenizer_config.json, or "
        f"tekken.json, of {repository} into a folder 'tokenizer' beside the weights, or name their place with "
        "--tokenizer PATH"
    )


def read_tokenizer(directory: Path, family: Family) -> PromptTokenizer:
    """The tokenizer in a folder: tokenizer.json with its configuration, or tekken.json, or vocab.json and merges.txt.

    Raises:
        ValueError: there is none, or it cannot be read or is of another family.
    """
    file = _tokenizer_file(directory)
    if file is None:
        raise ValueError(f"no tokenizer.json, tekken.json or vocab.json in {directory}")
    try:
        if file.name == "vocab.json":
            merges = read_limited(directory / "merges.txt", MAX_TOKENIZER_BYTES)
            return PromptTokenizer(read_qwen_vocabulary(read_json_object(file, MAX_TOKENIZER_BYTES), merges), family)
        if file.name == "tekken.json":
            return PromptTokenizer(read_tekken(read_limited(file, MAX_TOKENIZER_BYTES)), family)
        config_file = directory / "tokenizer_config.json"
        config = read_json_object(config_file) if config_file.is_file() else {}
        return PromptTokenizer(
            _parse_tokenizer(read_limited(file, MAX_TOKENIZER_BYTES)),
            family,
            chat_template=_chat_template(directory, config),
            pad_token=_token_text(config.get("pad_token")),
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_tekken(content: bytes) -> Tokenizer:
    """Builds a tokenizer from the bytes of a tekken.json: Mistral's byte-pair vocabulary.

    The file's own split pattern is used. Ids 0 .. n-1 are the special tokens; the token of rank r has id n + r.

    Raises:
        ValueError: the content is not a tekken file.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    try:
        data = json.loads(content)
        config = data["config"]
        special_tokens = _tekken_special_tokens(data)
        num_special_tokens = int(config.get("default_num_special_tokens") or len(special_tokens))
        size = int(config.get("default_vocab_size") or num_special_tokens + len(data["vocab"])) - num_special_tokens
        ranks = {base64.b64decode(token["token_bytes"]): int(token["rank"]) for token in data["vocab"]}
        ranks = {token: rank for token, rank in ranks.items() if rank < size}
        vocab, merges = _byte_pairs(ranks, num_special_tokens)
        tokenizer = Tokenizer(models.BPE(vocab=vocab | special_tokens, merges=merges, ignore_merges=True))
        split = pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated")
    except Exception as error:  # whatever a damaged file leads to, the regex engine's plain Exception included
        raise ValueError(f"not a tekken tokenizer: {type(error).__name__}: {error}") from error
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return tokenizer


def read_qwen_vocabulary(vocabulary: dict[str, Any], merges: bytes) -> Tokenizer:
    """Builds Qwen3's tokenizer from the content of vocab.json and merges.txt, which Qwen2.5 and Qwen3 share.

    Raises:
        ValueError: the two do not belong together.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        lines = [line for line in merges.decode("utf-8").splitlines() if line and not line.startswith("#version")]
        pairs: list[tuple[str, str]] = [(left, right) for left, right in (line.split(" ") for line in lines)]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # whatever a damaged file leads to, the library's plain Exception included
        raise ValueError(f"no byte-pair vocabulary with its merges.txt: {type(error).__name__}: {error}") from error
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in QWEN_ADDED_TOKENS])
    return tokenizer


def _tekken_special_tokens(data: dict[str, Any]) -> dict[str, int]:
    declared = data.get("special_tokens")
    if declared is None:
        return {token: rank for rank, token in enumerate(TEKKEN_DEFAULT_SPECIAL_TOKENS)}
    return {str(token["token_str"]): int(token["rank"]) for token in declared}


def _byte_pairs(ranks: dict[bytes, int], first_id: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as the ``tokenizers`` library wants them.

    tekken merges whichever neighbours form the token of lowest rank, so every way to split a token is a merge, in the
    order of the merged token's rank.
    """
    characters = _byte_characters()
    text = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:end], token[end:]) for end in range(1, len(token))]
        known = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges.extend((text[left], text[right]) for left, right in known)
    return {text[token]: first_id + rank for token, rank in ranks.items()}, merges


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies.

    Printable Latin-1 bytes stand for themselves, the others take the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _read_explicit(path: Path, family: Family) -> PromptTokenizer:
    if path.is_dir():
        inner = path / "tokenizer"
        return read_tokenizer(inner if _tokenizer_file(path) is None and inner.is_dir() else path, family)
    if not path.is_file():
        raise ValueError(f"there is no tokenizer at {path}")
    if path.name == "tokenizer.json":
        return read_tokenizer(path.parent, family)
    if path.suffix == ".json":
        try:
            return PromptTokenizer(read_tekken(read_limited(path, MAX_TOKENIZER_BYTES)), family)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    raise ValueError(f"{path} is no tokenizer: expected a folder, a tokenizer.json or a tekken.json")


def _checked(tokenizer: PromptTokenizer, vocab_size: int, place: str) -> PromptTokenizer:
    if tokenizer.max_id >= vocab_size:
        raise ValueError(
            f"the tokenizer in {place} does not fit the text encoder: its ids go to {tokenizer.max_id}, "
            f"the embedding has {vocab_size} rows"
        )
    return tokenizer


def _tokenizer_file(directory: Path) -> Path | None:
    for name in ("tokenizer.json", "tekken.json"):
        if (directory / name).is_file():
            return directory / name
    has_vocabulary = (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file()
    return directory / "vocab.json" if has_vocabulary else None


def _cached_directories(repository: str) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        files = [try_to_load_from_cache(repository, name) for name in ("tokenizer.json", "tekken.json")]
    except HFValidationError:  # the name of a bundled tokenizer, no repository
        return []
    return [Path(file).parent for file in files if isinstance(file, str)]


def _parse_tokenizer(content: bytes) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"not a tokenizer: {error}") from error


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return read_limited(file, MAX_JSON_BYTES).decode("utf-8")
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str | None:
    """tokenizer_config.json writes a special token as text or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
