"""An evaluation of a model in training: the loss of each eval file, and metrics on generated answers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

from onecard.config import TrainConfig, eval_key
from onecard.data.dataset import Dataset
from onecard.hf.attention import use_attention
from onecard.infer.batch import answer_all
from onecard.kernels.cpu.contention import sharing_cores
from onecard.memory.measure import apart
from onecard.train.evaluate import attention_of, mean_loss
from onecard.train.prepare import Prepared
from onecard.train.ranks import WORK
from onecard.train.run import Run
from onecard.train.scoring import Question, Score


@dataclass
class Evaluator:
    """What a run evaluates.

    Attributes:
        validation: the eval files by name; "" without a name.
        questions: of each file, what the model answers for the metrics; empty without metrics.
        attention: name of the model's own attention, for its answers. The training loop sets another one.
        ends: same as in `Answer`.
    """

    config: TrainConfig
    tokenizer: Any
    validation: dict[str, Dataset]
    attention: str
    questions: dict[str, list[Question]]
    scores: list[Score]
    ends: tuple[int, ...]

    def __call__(self, run: Run) -> dict[str, float]:
        """Return each metric by its name, with the model as it is. It works inside the training loop and outside."""
        found: dict[str, float] = {}
        with attention_of(run.base, run.loss), sharing_cores():
            for name, dataset in self.validation.items():
                if name in run.held_out:
                    scores = run.held_out[name].evaluate()
                    found |= {eval_key(name, key.removeprefix("eval_")): value for key, value in scores.items()}
                else:
                    found[eval_key(name, "loss")] = mean_loss(run.base, dataset, run.loss, run.ranks)
        for name in self.questions:
            found |= {eval_key(name, metric): value for metric, value in self.score(run, name).items()}
        return found

    def score(self, run: Run, name: str) -> dict[str, float]:
        """Return the metrics on the model's answers to the questions of a file."""
        how, asked = self.config, run.ranks.share(self.questions[name])
        training = run.model.training
        run.model.eval()
        with apart(), use_attention(run.base, self.attention), run.ranks.in_step(run.base):
            predictions = answer_all(
                run.model,
                self.tokenizer,
                [question.ids for question in asked],
                how.metric_max_new_tokens,
                how.per_device_eval_batch_size,
                [question.goes_on for question in asked],
                self.ends,
            )
        run.model.train(training)
        run.ranks.wait(WORK)
        pairs = [[text, question.reference] for text, question in zip(predictions, asked)]
        predictions, references = map(list, zip(*chain(*run.ranks.gather(pairs))))
        return {key: value for score in self.scores for key, value in score(predictions, references).items()}


def make_evaluator(prepared: Prepared, run: Run) -> Evaluator:
    """Return the evaluator of a run whose model is loaded and not in its training loop."""
    config, attention = prepared.config, run.base.config._attn_implementation
    asked = (prepared.questions, prepared.scores, prepared.form.end_tokens)
    return Evaluator(config, prepared.tokenizer, prepared.validation, str(attention), *asked)
