"""Make what `onecard demo` runs on: python examples/make_demo_base.py [--steps N] [--seed N] [--output DIR]

The demo needs a base model and a task that exist without a download, and a task on which fine-tuning visibly
matters. The task is one that every small shop has: a customer's message in, the order as compact JSON out.

A model of 3.5 million parameters knows nothing, so this script first gives it something to know. It writes a small
English world (people, streets, goods, days), trains a byte-level BPE tokenizer on it, and pretrains a Llama on
prose, copying exercises, questions about notes, small talk with customers, and records of other kinds written as
JSON. Nowhere in that text is a customer's message answered with an order: before fine-tuning the base replies to a
message with a kind sentence, after it with the order. The phrasings of the messages are the task's own as well.

Everything follows from the seed, up to the rounding of the machine that runs it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# ---------------------------------------------------------------------------------------------- the world's words

FIRST = """Ada Alma Amir Anya Basil Bela Bruno Carla Cleo Dario Dora Edgar Elin Emil Esra Fiona Flora Gita Hana Hugo
Ida Igor Ines Iris Ivan Jana Jonas Juno Karim Kira Lars Lena Leo Lina Luca Mara Marco Maya Mila Nadia Nils Nora
Olga Oskar Otto Paula Petra Quinn Rafael Rita Rosa Samir Selma Simon Sofia Tara Theo Uma Vera Viktor Yara
Zoe""".split()
LAST = """Adler Baker Bergman Blum Brandt Carver Castro Conti Cruz Dahl Duarte Engel Falk Ferrari Fischer Fuchs
Garcia Grant Haas Hansen Hart Holm Ivanov Jansen Keller Klein Kovacs Lang Lehmann Lopez Marin Meyer Moreau Nagy
Novak Olsen Ortega Petrov Quist Reyes Rossi Sato Schmidt Silva Stone Tanaka Tran Urban Vargas Voss Wagner Weber
Winter Wolf Young Zeman""".split()
STREETS = """Ash Birch Bridge Castle Cedar Chapel Church Elm Garden Harbor Hazel Hill Linden Maple Market Meadow Mill
Oak Orchard Pine River School Spring Station Temple Tower Walnut Willow""".split()
WAYS = "Street Road Lane Avenue".split()
GOODS = {
    "mug": "mugs", "bowl": "bowls", "plate": "plates", "teapot": "teapots", "vase": "vases", "lamp": "lamps",
    "basket": "baskets", "pillow": "pillows", "towel": "towels", "blanket": "blankets", "candle": "candles",
    "notebook": "notebooks", "pencil": "pencils", "apron": "aprons", "tray": "trays", "jar": "jars",
    "scarf": "scarves", "clock": "clocks", "box": "boxes", "brush": "brushes",
}  # fmt: skip
ANIMALS = {
    "goat": "goats", "hen": "hens", "horse": "horses", "sheep": "sheep", "duck": "ducks", "rabbit": "rabbits",
    "dog": "dogs", "cat": "cats", "goose": "geese", "cow": "cows",
}  # fmt: skip
COLORS = "red blue green white black yellow gray brown pink orange".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
CITIES = "Oslo Bern Riga Porto Lyon Graz Turin Malmo Ghent Bonn Split Cork Leeds Basel Nice Delft".split()
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
SKIES = "sunny rainy windy cloudy foggy snowy".split()
TRADES = "teacher baker driver nurse painter farmer singer tailor".split()
SENSORS = "heater pump freezer oven boiler fan".split()
TERMS = "customer items product color quantity street day name address order assistant user".split()
ENGLISH = [
    "Could you please send everything there?",
    "I would like it to be possible before then.",
    "My aunt and my sister are moving, and somebody told me about it.",
    "Can somebody bring it to our door again?",
    "If you still need it, wrap the gift and ship it.",
    "Deliver the order to my account, no later than this.",
    "I want to put it on the last list.",
    "We have run out of time, so drop it off as you can.",
    "Every customer gets a product in some quantity.",
    "Dear team, it is my party and I will be there by train.",
    "Hi, good morning! Hey there, good evening! Hello!",
    "Best wishes, many thanks, cheers, regards, yours.",
    "Do they live here? They do, and they are speaking until late.",
    "Thanks for the fine items from your street.",
]
ALL_WORDS = FIRST + LAST + STREETS + COLORS + sorted(GOODS) + DAYS + CITIES + TERMS

# The last names and streets that only held-out rows use: the fine-tuned model has to copy what it was never tuned on.
RARE_LAST = {"Castro", "Hansen", "Moreau", "Sato", "Voss", "Winter"}
RARE_STREETS = {"Cedar", "Harbor", "Walnut"}

# ------------------------------------------------------------------------------------- the task: message -> order

GREETINGS = ["Hi,", "Hello,", "Good morning,", "Dear team,", "Hey there,", "Good evening,"]
THANKS = ["Thanks!", "Thank you.", "Many thanks!", "Cheers!", "Best wishes!", ""]
MESSAGES = [
    "{hi} this is {name}, could you send {goods} to {street} by {day}? {thanks}",
    "{hi} please send {goods} to {street} by {day}. {thanks} {name}",
    "{hi} could you ship {goods} to {street}? I need everything on {day}. {thanks} {name}",
    "{hi} I would like {goods}. Deliver to {street} on {day}, please. {name}",
    "{hi} my name is {name} and I want to order {goods} for {day}. I live at {street}. {thanks}",
    "{hi} {name} here. Can I get {goods} at {street} before {day}? {thanks}",
    "{hi} we have run out, so please bring {goods} on {day}. Our door is {street}. Regards, {name}",
    "{hi} for my shop at {street} I need {goods}. {day} would be fine. {thanks} {name}",
    "Order from {name}: {goods}, to {street}, on {day}. {thanks}",
    "{hi} it is {name} again. {day} is my party at {street} and I still need {goods}! {thanks}",
    "{hi} {goods}, please. To {name}, {street}, no later than {day}. {thanks}",
    "On {day} I will be at {street}. Could {goods} be there by then? Yours, {name}",
    "{hi} please put {goods} on my account. {street}, {day}. {thanks} {name}",
    "{hi} my sister told me about you. I will take {goods}. Is {day} possible? {name}, {street}",
    "{hi} can somebody drop off {goods} this {day}? The address is {street} and I am {name}. {thanks}",
    "{name}, {street}. Need {goods} until {day}. {thanks}",
    "{hi} I am moving to {street} and want {goods} there on {day}. {thanks} {name}",
    "{hi} as a gift for my aunt I want {goods}. Wrap it and send it to {street} for {day}. {name}",
]
HELDOUT_MESSAGES = [
    "{hi} {name} speaking. I want {goods}, sent to {street}, and {day} is the last day. {thanks}",
    "{hi} do you still have {goods}? If so, send them to {street} on {day}. {thanks} {name}",
]


def person(rng: Random) -> str:
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


def address(rng: Random) -> str:
    return f"{rng.randint(1, 99)} {rng.choice(STREETS)} {rng.choice(WAYS)}"


def make_order(rng: Random) -> dict:
    """What a customer wants, in the form the task asks for."""
    products = rng.sample(sorted(GOODS), rng.choice([1, 2]))
    return {
        "customer": person(rng),
        "items": [
            {"product": product, "color": rng.choice(COLORS), "quantity": rng.randint(1, 12)} for product in products
        ],
        "street": address(rng),
        "day": rng.choice(DAYS),
    }


def counted(count: int, color: str, thing: str, rng: Random, plurals: dict[str, str] = GOODS) -> str:
    """A count of things in words: "three blue mugs", "an orange vase", "12 gray jars"."""
    if count == 1:
        return f"{rng.choice(['one', 'an' if color[0] in 'aeiou' else 'a'])} {color} {thing}"
    written = ["a dozen", "12", "twelve"] if count == 12 else [NUMBERS[count - 1]] * 2 + [str(count)]
    return f"{rng.choice(written)} {color} {plurals[thing]}"


def spoken(items: list[dict], rng: Random) -> str:
    lines = [counted(item["quantity"], item["color"], item["product"], rng) for item in items]
    return rng.choice([" and ", " and ", " plus "]).join(lines)


def fill(template: str, order: dict, rng: Random) -> str:
    """A template with the order's words in it, as a sentence."""
    text = template.format(
        hi=rng.choice(GREETINGS),
        thanks=rng.choice(THANKS),
        name=order["customer"],
        goods=spoken(order["items"], rng),
        street=order["street"],
        day=order["day"],
    )
    text = " ".join(text.split())
    return text[0].upper() + text[1:]


def compact(record: dict | list) -> str:
    return json.dumps(record, separators=(",", ":"))


def is_rare(order: dict) -> bool:
    return order["customer"].split()[1] in RARE_LAST or order["street"].split()[1] in RARE_STREETS


def task_rows(count: int, seed: int, templates: list[str], taken: set[str], rare: bool) -> list[dict]:
    """Rows of the task. Each customer and each address is new (`taken` grows); rare words only where wanted."""
    rng, rows = Random(seed), []
    while len(rows) < count:
        order = make_order(rng)
        parts = {order["customer"], compact(order["items"])}
        if (is_rare(order) and not rare) or parts & taken:
            continue
        taken |= parts
        user = fill(rng.choice(templates), order, rng)
        turns = [("user", user), ("assistant", compact(order))]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def write_data(folder: Path, seed: int) -> None:
    """heldout.jsonl and train.jsonl, which share no customer, no list of goods and thus no message."""
    taken: set[str] = set()
    heldout = task_rows(150, seed + 1, MESSAGES * 2 + HELDOUT_MESSAGES * 2, taken, rare=True)
    train = task_rows(1200, seed + 2, MESSAGES, taken, rare=False)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("heldout", heldout)):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------- what the base reads: never the task


def chat(*turns: str) -> str:
    """Turns of user and assistant in the chat template's own form."""
    roles = ("user", "assistant")
    said = (f"<|im_start|>{roles[i % 2]}\n{turn}<|im_end|>\n" for i, turn in enumerate(turns))
    return "<|bos|>" + "".join(said)


def sentence(rng: Random) -> str:
    """A line of plain prose."""
    name, place, n = person(rng), address(rng), rng.randint(1, 12)
    day, color, thing = rng.choice(DAYS), rng.choice(COLORS), rng.choice(sorted(GOODS))
    lines = [
        f"{name} is a {rng.choice(TRADES)} and lives at {place}.",
        f"On {day} it was {rng.choice(SKIES)} in {rng.choice(CITIES)}.",
        f"{name} bought {counted(n, color, thing, rng)} and gave it all to {person(rng)}.",
        f"The {color} {thing} stands beside the {rng.choice(COLORS)} {rng.choice(sorted(GOODS))}.",
        f"I think the {thing} is too {rng.choice(['big', 'small', 'dear', 'old'])}, but {name} likes it.",
        f"{NUMBERS[n - 1]} is written {n}, and {n} is read {NUMBERS[n - 1]}. A dozen is 12.",
        f"One {thing}, many {GOODS[thing]}. Many {GOODS[thing]}, one {thing}.",
        f"The shop at {place} opens on {day}.",
        *rng.sample(ENGLISH, 4),
    ]
    return rng.choice(lines)


def copying(rng: Random) -> str:
    """Things that were said before, said again: what teaches a model to look back."""
    name, place, day = person(rng), address(rng), rng.choice(DAYS)
    words = rng.sample(ALL_WORDS, rng.randint(4, 9))
    lines = [
        f"Say again: {' '.join(words)}. Again: {' '.join(words)}.",
        f"Write as a JSON list: {' '.join(words)}. {compact(words)}",
        f"name: {name}. address: {place}. day: {day}. So the name was {name}, the address {place}, the day {day}.",
        f"{name} lives at {place}. Who lives there? {name}. Where? {place}.",
        f'{day}: {name}, {place}. {{"day":"{day}","name":"{name}","address":"{place}"}}',
    ]
    return rng.choice(lines)


def keyed(values: dict, names: dict[str, list[str]], rng: Random) -> tuple[str, dict]:
    """The values under keys drawn from their names and in a drawn order; with the words that ask for just these."""
    order = rng.sample(sorted(values), len(values))
    record = {rng.choice(names[key]): values[key] for key in order}
    return ", ".join(record), record


def listed(rng: Random) -> tuple[str, str, dict]:
    """Animals of a farm: a text, the keys asked for, and a record with a list in it."""
    name, place = person(rng), address(rng)
    kinds = rng.sample(sorted(ANIMALS), rng.choice([1, 2, 2, 3]))
    animals = [(rng.randint(1, 12), rng.choice(COLORS), kind) for kind in kinds]
    text = rng.choice([
        "{name} keeps {herd} at {place}.",
        "There are {herd} at {place}, and {name} feeds them.",
        "At {place} {name} counted {herd} today.",
    ])  # fmt: skip
    herd = " and ".join(counted(n, color, kind, rng, ANIMALS) for n, color, kind in animals)
    keys = rng.sample(["n", "kind", "look"], 3)
    inner = [{key: {"n": n, "kind": kind, "look": color}[key] for key in keys} for n, color, kind in animals]
    outer, record = keyed(
        {"who": name, "herd": inner, "place": place},
        {"who": ["farmer", "owner", "name"], "herd": ["animals", "herd"], "place": ["farm", "place", "address"]},
        rng,
    )
    return text.format(name=name, herd=herd, place=place), f"{outer}; {', '.join(keys)}", record


def flat(rng: Random) -> tuple[str, str, dict]:
    """Weather, a meeting, a contact, a sensor or a shelf: a text, the keys asked for, and a flat record."""
    name, other, place, city = person(rng), person(rng), address(rng), rng.choice(CITIES)
    day, thing, color, sky = rng.choice(DAYS), rng.choice(sorted(GOODS)), rng.choice(COLORS), rng.choice(SKIES)
    n, degrees, sensor = rng.randint(1, 12), rng.randint(1, 99), rng.choice(SENSORS)
    text, values, names = rng.choice([
        (f"On {day} it is {sky} in {city}, {degrees} degrees.",
         {"a": city, "b": sky, "c": degrees, "d": day},
         {"a": ["city", "place"], "b": ["sky", "weather"], "c": ["degrees", "heat"], "d": ["day", "date"]}),
        (f"{name} meets {other} at {place} on {day}.",
         {"a": name, "b": other, "c": place, "d": day},
         {"a": ["host", "person"], "b": ["guest", "with"], "c": ["at", "place"], "d": ["day", "date"]}),
        (f"{name}, a {rng.choice(TRADES)}, has moved to {place} in {city}.",
         {"a": name, "c": place, "d": city},
         {"a": ["name", "person"], "c": ["address", "home"], "d": ["city", "town"]}),
        (f"The {sensor} in {city} shows {degrees} degrees and alarm {NUMBERS[n - 1]}.",
         {"a": sensor, "b": degrees, "c": n, "d": city},
         {"a": ["sensor", "device"], "b": ["value", "degrees"], "c": ["alarm", "code"], "d": ["city", "site"]}),
        (f"Shelf {degrees} holds {counted(n, color, thing, rng)}.",
         {"a": degrees, "b": thing, "c": color, "d": n},
         {"a": ["shelf", "row"], "b": ["holds", "thing"], "c": ["tone", "look"], "d": ["count", "stock"]}),
        (f"{name} found {counted(n, color, thing, rng)} on {day}.",
         {"a": name, "b": thing, "c": color, "d": n, "e": day},
         {"a": ["finder", "name"], "b": ["found", "thing"], "c": ["look"], "d": ["count", "n"], "e": ["day"]}),
    ])  # fmt: skip
    keys, record = keyed(values, names, rng)
    return text, keys, record


def record(rng: Random) -> str:
    """Records of kinds that are no orders, asked for by their keys."""
    text, keys, written = rng.choice([flat, listed])(rng)
    asked = rng.choice([f"{text} As JSON with {keys}.", f"Write as JSON with {keys}: {text}"])
    return chat(asked, compact(written))


NOTES = [
    "{name} of {street} came in and asked for {goods}. The van leaves on {day}.",
    "The van goes to {street} on {day} with {goods} for {name}.",
    "I saw {goods} in your window. My home is {street}, I am free on {day}. {name}",
    "{day}: {name} picks up {goods}. Later we drive to {street}.",
    "From the desk of {name}, {street}. Are {goods} ready on {day}?",
    "{goods} broke on {day}, says {name} from {street}.",
    "You sold {goods} to me on {day}. I liked it. {name} from {street}",
    "Hello, I am {name}. On {day} I left {goods} at {street}. Did you find it?",
]


def questions(rng: Random) -> str:
    """A note and questions about it, answered in words."""
    order = make_order(rng)
    items = order["items"]
    one = rng.choice(items)
    pairs = [
        ("Who is it?", order["customer"]),
        ("Which address?", order["street"]),
        ("Which day?", order["day"]),
        (f"How many {GOODS[one['product']]}?", str(one["quantity"])),
        (f"What color is the {one['product']}?", one["color"]),
        ("What is it about?", ", ".join(item["product"] for item in items)),
        ("Which numbers, in digits?", ", ".join(str(item["quantity"]) for item in items)),
        ("Which colors?", ", ".join(item["color"] for item in items)),
        ("Name, address and day?", f"{order['customer']}; {order['street']}; {order['day']}"),
    ]
    (first, answer), *rest = rng.sample(pairs, rng.randint(3, 5))
    turns = [f"{fill(rng.choice(NOTES), order, rng)}\n{first}", answer]
    return chat(*turns, *(turn for pair in rest for turn in pair))


def small_talk(rng: Random) -> str:
    """A note answered as a shop would answer it: with a kind sentence."""
    order = make_order(rng)
    first, day, goods = order["customer"].split()[0], order["day"], GOODS[order["items"][0]["product"]]
    replies = [
        f"Thank you, {first}. We will look for the {goods}.",
        f"Dear {first}, {day} is fine. See you soon!",
        f"Good to hear from you, {first}. The {goods} are lovely.",
        f"Thank you, {first}. We know {order['street']} well.",
    ]
    return chat(fill(rng.choice(NOTES), order, rng), rng.choice(replies))


def documents(seed: int) -> Iterator[str]:
    """The base's reading matter, without end."""
    rng = Random(seed)
    while True:
        kind = rng.random()
        if kind < 0.08:
            yield "<|bos|>" + " ".join(sentence(rng) for _ in range(3)) + "<|im_end|>\n"
        elif kind < 0.20:
            yield "<|bos|>" + " ".join(copying(rng) for _ in range(2)) + "<|im_end|>\n"
        elif kind < 0.60:
            yield record(rng)
        elif kind < 0.95:
            yield questions(rng)
        else:
            yield small_talk(rng)


# ------------------------------------------------------------------------------------------ tokenizer and model

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(seed: int, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text goes in and comes out again, and the world's words are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = documents(seed)
    tokenizer.train_from_iterator((next(text) for _ in range(10_000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama whose every linear layer reads a multiple of 64 values, the block size of NF4."""
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, rows: int, length: int) -> Iterator[torch.Tensor]:
    """int64 (rows, length), cut from the endless text."""
    text, buffer = documents(seed), []
    while True:
        while len(buffer) < rows * length:
            pieces = [next(text) for _ in range(256)]
            for ids in tokenizer(pieces, add_special_tokens=False)["input_ids"]:
                buffer += ids
        yield torch.tensor(buffer[: rows * length]).view(rows, length)
        buffer = buffer[rows * length :]


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, which learns more from each of the few tokens; AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def pretrain(model: LlamaForCausalLM, data: Iterator[torch.Tensor], steps: int) -> None:
    """Next-token prediction with a short warm-up and a cosine decay to nothing.

    Weights and optimizer state are float32; the products are bfloat16 where the processor has them, for speed.
    """
    optimizers = make_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start, fast = time.time(), bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    for step in range(steps):
        share = min((step + 1) / 50, (1 + math.cos(math.pi * step / steps)) / 2)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * share
        ids = next(data)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.time() - start:5.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1400, help="0 makes the data only")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "onecard" / "demo")
    args = parser.parse_args()
    write_data(args.output / "data", args.seed)
    if args.steps == 0:
        return
    torch.manual_seed(args.seed)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    pretrain(model, batches(tokenizer, args.seed, rows=16, length=256), args.steps)
    model.to(torch.bfloat16).save_pretrained(args.output / "base")
    tokenizer.save_pretrained(args.output / "base")


if __name__ == "__main__":
    main()
