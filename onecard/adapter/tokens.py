"""Rows of embedding and head that an adapter trains, for new tokens or for some of the model's own.

peft's trainable_token_indices copies the whole matrix at each use and needs one that has a row for each index. Here the
matrix stays as it is: in 16 bits, in place, paged or not. The adapter's rows take its rows' place or follow them, and
only they have gradients. So the rows are there with their adapter alone, also where several adapters share a base.

    embedding   y = rows[x] where x is one of the indices, else W[x]
    head        z = [W h, rows h], without the products of W's rows whose place is taken

The adapter is saved in peft's format: float32 rows, which peft and merge round to the matrix's dtype, as each use does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from onecard.adapter.layers import not_into_4_bits
from onecard.errors import UserError
from onecard.hf.load import resize_vocabulary
from onecard.hf.tokens import NewTokens
from onecard.nn.embedding import NewRows
from onecard.paging.weights import PagedEmbedding

TRAINED = "trainable_token_indices"


@dataclass(frozen=True, eq=False)
class Place:
    """Where an adapter's rows are in a matrix of V rows.

    Attributes:
        index_N: int64, the token of each row.
        low: those below V.
        table: int64 (V + num_beyond,): the number of a token's row, or -1.
    """

    index_N: Tensor
    low: Tensor
    table: Tensor
    num_beyond: int

    @classmethod
    def of(cls, indices: list[int], num_own: int, device: torch.device) -> Place:
        index_N = torch.tensor(indices, dtype=torch.int64)
        beyond = sorted(index for index in indices if index >= num_own)
        assert beyond == list(range(num_own, num_own + len(beyond))), "checked by grown"
        table = torch.full((num_own + len(beyond),), -1)
        table[index_N] = torch.arange(len(indices))
        low = index_N[index_N < num_own]
        return cls(index_N.to(device), low.to(device), table.to(device), len(beyond))


class TokenRows(TrainableTokensLayer):
    """peft's layer of trained rows around an embedding or a head, without a copy of the matrix.

    `trainable_tokens_original` has the rows at the start of a training, which take part while adapters are disabled:
    the reference of preferences has them. It is empty for a loaded adapter, whose base has no new tokens.
    """

    base_layer: Any

    def __init__(self, base_layer: Any, adapter_name: str, tied: TokenRows | None = None):
        super().__init__(base_layer, adapter_name, tied_adapter=tied)
        self.places: dict[str, Place] = {}

    @classmethod
    def in_place_of(cls, layer: TrainableTokensLayer, base_layer: Any, tied: TokenRows | None) -> TokenRows:
        """Return a layer with the adapters of peft's, whose rows may be on the meta device, around another matrix."""
        with warnings.catch_warnings(action="ignore"):  # peft's, about a paged embedding
            made = cls(base_layer, layer.active_adapters[0] if layer.active_adapters else "", tied)
        made._active_adapter, made._disable_adapters = layer._active_adapter, layer._disable_adapters
        if tied is None:
            made.trainable_tokens_delta = layer.trainable_tokens_delta
            made.trainable_tokens_original = layer.trainable_tokens_original
            made.token_indices = layer.token_indices
            for name, rows in layer.trainable_tokens_delta.items():
                made.allocate(name, rows.requires_grad)
        return made

    @property
    def num_own(self) -> int:
        """Rows of the matrix itself."""
        own: Any = self.base_layer
        return own.out_features if isinstance(own, nn.Linear) else own.num_embeddings

    @property
    def width(self) -> int:
        own: Any = self.base_layer
        return own.in_features if isinstance(own, nn.Linear) else own.embedding_dim

    def allocate(self, name: str, learns: bool) -> None:
        """Make an adapter's rows, NaN until they are set."""
        device, size = self.base_layer.weight.device, len(self.token_indices[name])
        rows = torch.full((size, self.width), float("nan"), device=device)
        self.trainable_tokens_delta[name] = nn.Parameter(rows, requires_grad=learns)
        self.trainable_tokens_original[name] = rows[:0].clone()

    def update_layer(self, adapter_name: str, config: Any = None, tied_adapter: Any = None, **kwargs: Any) -> None:
        """Add an adapter: peft calls it for a second one."""
        if tied_adapter is not None or self.tied_adapter is not None:
            return
        self.token_indices[adapter_name] = kwargs["token_indices"]
        self.allocate(adapter_name, True)

    def place(self, name: str) -> Place:
        if name not in self.places:
            self.places[name] = Place.of(self.token_indices[name], self.num_own, self.base_layer.weight.device)
        return self.places[name]

    def new_rows(self, adapters: list[str]) -> tuple[NewRows, Place] | None:
        """Return the rows that take part, and their place; None if the matrix is alone."""
        names = [name for name in adapters if name in self.token_indices]
        if not names:
            return None
        (name,) = names  # peft refuses two active ones
        rows: Any = self.trainable_tokens_original[name] if self.disable_adapters else self.trainable_tokens_delta[name]
        if not len(rows):
            return None
        place = self.place(name)
        return NewRows(rows, place.index_N, place.low, place.num_beyond, self.base_layer.weight.dtype), place

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Tensor:
        found = self.new_rows(list(active_adapters))
        if found is None:
            return self.base_layer(x, *args, **kwargs)
        new, place = found
        if isinstance(self.base_layer, nn.Linear):
            return new.extend(self.base_layer(x), x)
        number = place.table[x]
        y = self.base_layer(x.clamp(max=self.num_own - 1))
        rows = nn.functional.embedding(number.clamp(min=0), new.rows_NH)  # float32: so are the sums of its gradients
        rows = self.scaled(rows.to(new.dtype))
        return torch.where((number >= 0)[..., None], rows.to(y.dtype), y)

    def scaled(self, rows: Tensor) -> Tensor:
        """Return rows as the embedding gives them: some families' multiply by a constant."""
        scale = self._get_embed_scale()
        return rows if scale is None else rows * scale.to(rows.dtype)

    def get_merged_weights(self, active_adapters: Any) -> Tensor:
        """Return the whole matrix, for code that reads it; a paged embedding has only an empty one."""
        found, W = self.new_rows(list(active_adapters)), self.base_layer.weight
        if found is None or isinstance(self.base_layer, PagedEmbedding):
            return W
        new, place = found
        W = torch.cat([W, W.new_empty(place.num_beyond, W.shape[1])])
        return W.index_copy(0, new.index_N, new.rounded(W.dtype))

    def own_rows(self, ids: list[int]) -> Tensor:
        """Return rows of the matrix, float32 (len(ids), H)."""
        own: Any = self.base_layer
        if isinstance(own, PagedEmbedding):
            return own.rows(ids).float()
        return own.weight[torch.tensor(ids, device=own.weight.device)].float()

    @torch.no_grad()
    def start(self, name: str, pieces: dict[int, list[int]]) -> None:
        """Set an adapter's rows to the mean of the rows of each token's pieces.

        Raises:
            UserError: an embedding that is no table of rows.
        """
        means = [self.own_rows(pieces[index]).mean(0) for index in self.token_indices[name]]
        rows = torch.stack(means).to(self.base_layer.weight.device)
        self.trainable_tokens_delta[name].copy_(rows)
        self.trainable_tokens_original[name] = rows.clone()
        if isinstance(self.base_layer, nn.Linear):
            return
        some = list(dict.fromkeys(piece for found in pieces.values() for piece in found))[:64]
        given = self.base_layer(torch.tensor(some, device=self.base_layer.weight.device)).float()
        wanted = self.scaled(self.own_rows(some).to(self.base_layer.weight.dtype)).to(given.device).float()
        if not torch.allclose(given, wanted, rtol=2**-6, atol=0):
            must = "new tokens need an embedding that is a table of rows"
            raise UserError(must, type(self.base_layer).__name__, "leave add_tokens out", "add_tokens")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise not_into_4_bits()


class RowsWrapper(TrainableTokensWrapper):
    """peft's wrapper around TokenRows, also where another adapter of the model has no trained rows."""

    def __init__(self, wrapper: TrainableTokensWrapper, layer: TokenRows):
        nn.Module.__init__(self)  # peft's would make its own layer
        self._active_adapter, self._disable_adapters = wrapper._active_adapter, wrapper._disable_adapters
        self._adapters = wrapper._adapters
        self.token_adapter = layer

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().adapter_state_dict(adapter_name, state_dict) if adapter_name in self._adapters else {}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        return super().adapter_state_dict_load_map(adapter_name) if adapter_name in self._adapters else {}


def layers_of(model: Any) -> list[TokenRows]:
    """Return a model's layers of trained rows. That of a head that is tied to the embedding has the same rows."""
    return [module for module in model.modules() if isinstance(module, TokenRows)]


def head_parts(head: Any) -> tuple[Any, NewRows | None]:
    """Return a head's own module, and the trained rows beside it."""
    if not isinstance(head, TrainableTokensWrapper):
        return head, None
    layer: Any = head.token_adapter
    found = layer.new_rows(layer.active_adapters)
    return layer.base_layer, None if found is None else found[0]


def vocabulary_of(model: Any, adapters: list[str] | None = None) -> int:
    """Return the number of tokens that a model reads, with those of its active adapter, or of `adapters`."""
    layer, own = getattr(model.get_input_embeddings(), "token_adapter", None), model.config.get_text_config().vocab_size
    if not isinstance(layer, TokenRows):
        return own
    names = layer.active_adapters if adapters is None else adapters
    return own + sum(layer.place(name).num_beyond for name in names if name in layer.token_indices)


@contextmanager
def with_rows(model: Any) -> Iterator[None]:
    """Let trained rows take part though adapters are disabled: the model as it would be with its tokens alone."""
    wrappers = [module for module in model.modules() if isinstance(module, TrainableTokensWrapper)]
    for wrapper in wrappers:
        wrapper.enable_adapters(True)
    try:
        yield
    finally:
        for wrapper in wrappers:
            wrapper.enable_adapters(False)


def indices_of(trained: Any) -> list[int]:
    """Return all tokens that a peft config's trainable_token_indices name."""
    found = trained.values() if isinstance(trained, dict) else [trained or []]
    return sorted({index for indices in found for index in indices})


@contextmanager
def grown(base: Any, trained: Any) -> Iterator[None]:
    """Let peft add an adapter with trained rows to transformers' model inside the block.

    peft sees an embedding and a head on the meta device that have a row for each token. After the block, its wrappers
    are around the model's own, as TokenRows.

    Args:
        trained: the peft config's trainable_token_indices; may be empty.

    Raises:
        UserError: the rows would leave a gap behind the model's own.
    """
    indices = indices_of(trained)
    if not indices:
        yield
        return
    ends = [
        (base.get_input_embeddings, base.set_input_embeddings),
        (base.get_output_embeddings, base.set_output_embeddings),
    ]
    embedding: Any = ends[0][0]()
    embedding = getattr(embedding, "original_module", embedding)
    num_own, width = embedding.num_embeddings, embedding.embedding_dim
    beyond = [index for index in indices if index >= num_own]
    if beyond != list(range(num_own, num_own + len(beyond))):
        must = "an adapter's tokens must follow the model's own without a gap"
        found = f"row {beyond[-1]} behind {num_own:,} rows"
        raise UserError(must, found, "use the model that the adapter was trained on", TRAINED)
    num_rows = num_own + len(beyond)
    empty = (nn.Embedding(num_rows, width, device="meta"), nn.Linear(width, num_rows, bias=False, device="meta"))
    own = [None if isinstance(get(), TrainableTokensWrapper) else get() for get, _ in ends]
    for (_, put), module, stand_in in zip(ends, own, empty):
        if module is not None:
            put(stand_in)
    try:
        with warnings.catch_warnings():  # torch's, about rows that have no memory yet
            warnings.filterwarnings("ignore", "for .*trainable_tokens_delta")
            yield
    finally:
        for (get, put), module, stand_in in zip(ends, own, empty):
            if module is not None and get() is stand_in:
                put(module)
    for (get, put), module in zip(ends, own):
        wrapper = get()
        if module is None or wrapper is module:
            continue
        if not isinstance(wrapper, TrainableTokensWrapper):
            must, found = "trained rows need a head without LoRA", f"a {type(wrapper).__name__}"
            raise UserError(must, found, "leave the head out of target_modules", TRAINED)
        layer: Any = wrapper.token_adapter
        tied: Any = None if layer.tied_adapter is None else ends[0][0]().token_adapter
        put(RowsWrapper(wrapper, TokenRows.in_place_of(layer, module, tied)))


def trained_indices(base: Any, new: NewTokens) -> Any:
    """Return peft's trainable_token_indices for new tokens: of the embedding, and of a head with a weight of its own.

    Raises:
        UserError: the config says that the head is the embedding, and it is not, or the other way round.
    """
    names = {module: name for name, module in base.named_modules()}
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    indices, ties = list(new.texts), bool(base.config.to_dict().get("tie_word_embeddings", False))
    shared = ties if isinstance(embedding, PagedEmbedding) else head.weight is embedding.weight
    if shared != ties:
        must = "new tokens need a config.json that says whether the head is the embedding"
        found = f"tie_word_embeddings {ties}, and {'one weight' if shared else 'two weights'}"
        raise UserError(must, found, "correct tie_word_embeddings in a copy of the checkpoint", "config.json")
    return indices if ties else {names[embedding]: indices, names[head]: indices}


def add_adapter(base: Any, config: Any, new: NewTokens) -> Any:
    """Return peft's model: transformers' with a new adapter, and rows for new tokens. A row starts at the mean of the
    rows of its token's pieces.

    Args:
        config: peft's. With embedding and head in modules_to_save, both get rows of their own and are trained in full.

    Raises:
        UserError: an embedding that is no table of rows; same as `trained_indices`.
        ValueError: peft's, for targets that it does not find.
    """
    saved = tuple(f".{name}" for name in config.modules_to_save or ())
    names = {module: name for name, module in base.named_modules()}
    if new.texts and saved and f".{names[base.get_input_embeddings()]}".endswith(saved):
        resize(base, new)
    elif new.texts:
        config.trainable_token_indices = trained_indices(base, new)
    with grown(base, config.trainable_token_indices):
        model = get_peft_model(base, config)
    for layer in layers_of(model):
        if layer.tied_adapter is None:
            layer.start("default", new.pieces)
    return model


@torch.no_grad()
def resize(base: Any, new: NewTokens) -> None:
    """Give embedding and head of a resident model whole matrices with a row for each token."""
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    index = list(new.texts)
    means = [torch.stack([end.weight[new.pieces[i]].float().mean(0) for i in index]) for end in ends]
    if new.num_rows > len(ends[0].weight):
        resize_vocabulary(base, new.num_rows)
    for end, rows in zip((base.get_input_embeddings(), base.get_output_embeddings()), means):
        end.weight[index] = rows.to(end.weight.dtype)
