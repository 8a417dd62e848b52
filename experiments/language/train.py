"""Trains a Transformer-XL sparse, on bytes or on words.

  python -m experiments.language.train

trains a small one with Top-KAST at 80% on the source text of Python's own
standard library: no download, a few minutes on two CPU cores.

  python -m experiments.language.train --dataset=text --text_file=FILE \
      --model=small --method=rigl --sparsity=0.9 --train_steps=5000

trains on any text. The recipe of Top-KAST's appendix A for enwik8, which nobody
has run with this program yet, is

  --dataset=enwik8 --model=enwik8_large --batch_size=64 --train_steps=400000
  --optimizer=adam --learning_rate=2e-4 --warmup_share=0.01 --clip_norm=0.25
  --weight_decay=0 --dropout=0.1

(its batch size and steps are not published; these are of the official
Transformer-XL code). The text is read as --batch_size contiguous streams, and
the memory of each goes on from step to step; it is part of the state, so that a
killed run continues bit for bit. The data of a test are the streams of
--eval_batch_size rows, each token scored once, with a memory of
--eval_memory_length. Bytes are reported in bits per character (a byte is a
character, as is the custom with enwik8), words in perplexity, never mixed.

--sample=500 prints that many tokens written by the trained network. Leaves in
--workdir what experiments.image.train leaves.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp

import sparse_jax
from experiments import devices
from experiments import programs
from experiments import run_flags
from experiments import tasks
from experiments import training
from experiments.language import input_pipeline
from experiments.language import models

flags.DEFINE_enum('dataset', 'stdlib', sorted(input_pipeline.DATASETS),
                  'What to train on. All but stdlib and text must be prepared '
                  'before.')
flags.DEFINE_string('text_file', None, '--dataset=text: the file, or a folder '
                    'with train.txt, valid.txt and test.txt.')
flags.DEFINE_enum('level', None, ['byte', 'word'], 'What a token is. Default: '
                  'the data set\'s own.')
flags.DEFINE_enum('model', 'tiny', sorted(models.MODELS), 'The network.')
flags.DEFINE_float('width', 1., 'Multiplier of the network\'s widths.',
                   lower_bound=0, upper_bound=1e6)
flags.DEFINE_float('dropout', 0., 'Dropout rate.', lower_bound=0,
                   upper_bound=1)
flags.DEFINE_float('abs_top_k', 0., 'Fraction of each vector of activations '
                   'inside layers that is zeroed, the largest by magnitude '
                   'staying, in [0, 1). Weight-sparse transformers have 0.75.',
                   lower_bound=0, upper_bound=1)
flags.DEFINE_integer('segment_length', None, 'Tokens of a stream per step. '
                     'Default: the network\'s own.', lower_bound=1)
flags.DEFINE_integer('memory_length', None, 'Tokens remembered in training. '
                     'Default: the network\'s own.', lower_bound=0)
flags.DEFINE_integer('eval_memory_length', None, 'Tokens remembered in '
                     'evaluation. Default: the network\'s own.', lower_bound=0)
flags.DEFINE_integer('eval_batch_size', None, 'Streams of an evaluation. '
                     'Default: --batch_size.')
flags.DEFINE_enum('eval_split', 'test', ['valid', 'test'], 'What evaluations '
                  'read.')
run_flags.define_flags(batch_size=16, examples='Streams', optimizer='adam',
                       learning_rate=1e-3, weight_decay=0., clip_norm=.25,
                       target=.8, train_steps=1000)
flags.DEFINE_integer('sample', 0, 'Prints so many tokens of the network in the '
                     'end.')
flags.DEFINE_string('prompt', '\n', 'What a sample goes on from.')
flags.DEFINE_float('sample_temperature', 1., '0 for the likeliest token.')

# What a sample is asked for has no part in the run.
NOT_OF_THE_RUN = ('sample', 'prompt', 'sample_temperature')
FREE = run_flags.FREE  # Flags that a continued run may change.
LENGTHS = ('segment_length', 'memory_length', 'eval_memory_length')


@dataclasses.dataclass(frozen=True)
class Prediction(tasks.Problem):
  """What is learned: each token from those before."""

  model: models.TransformerXL
  level: str
  batch_size: int
  eval_batch_size: int
  segment_length: int
  memory_length: int
  eval_memory_length: int

  def init(self, key):
    """Parameters, and an empty memory of every stream."""
    tokens = jnp.zeros((1, self.segment_length), jnp.int32)
    memory = models.init_memory(self.model, 1, self.memory_length)
    params = self.model.init(key, tokens, tokens, memory, train=False)['params']
    return params, models.init_memory(self.model, self.batch_size,
                                      self.memory_length)

  def loss(self, weights, memory, batch, key):
    """Mean nats of a token, and the memory with this segment in it."""
    losses, memory = self.apply(weights, memory, batch, train=True,
                                rngs={'dropout': key})
    return losses.mean(), (memory, {})

  def log_probabilities(self, weights, memory, batch, key):
    """Of every next token, without dropout: what a student learns from."""
    del key
    memory = models.reset_memory(memory, batch['begins'])
    return self.model.apply({'params': weights}, batch['inputs'], memory,
                            method=self.model.logits)[0]

  def score(self, weights, memory, carry, batch):
    """The evaluation's own memory, and the nats of a batch summed up."""
    del memory  # Of the training text.
    losses, carry = self.apply(weights, carry, batch, train=False)
    weight = batch['weight']
    return carry, {'loss': jnp.sum(losses * weight), 'weight': jnp.sum(weight)}

  def apply(self, weights, memory, batch, **options):
    """Nats of each target, float32[b, t], and the memory."""
    memory = models.reset_memory(memory, batch['begins'])
    return self.model.apply({'params': weights}, batch['inputs'],
                            batch['targets'], memory, **options)

  def examples(self, size):
    """Shapes of a memory, and of a batch."""
    shape = jax.ShapeDtypeStruct
    tokens = shape((size, self.segment_length), jnp.int32)
    memory = jax.eval_shape(lambda: models.init_memory(
        self.model, size, self.memory_length))
    return memory, {'inputs': tokens, 'targets': tokens,
                    'begins': shape((size,), bool)}

  def inference(self, memory):
    """What accounting counts: one segment with a full memory."""
    del memory  # Of the training text.
    memory = jax.eval_shape(lambda: models.init_memory(
        self.model, 1, self.memory_length))
    tokens = jax.ShapeDtypeStruct((1, self.segment_length), jnp.int32)

    def apply(weights, inputs):
      tokens, memory = inputs
      return self.model.apply({'params': weights}, tokens, tokens, memory,
                              train=False)
    return apply, (tokens, memory)

  def results(self, means):
    """Bits of a character, or the perplexity of a word."""
    loss = means['loss']
    if self.level == 'byte':
      return {'loss': loss, 'bits_per_character': loss / math.log(2)}
    return {'loss': loss, 'perplexity': math.exp(min(loss, 700.))}

  def first_carry(self):
    """A memory as long as evaluation wants it."""
    return models.init_memory(self.model, self.eval_batch_size,
                              self.eval_memory_length)

  def batch_axes(self, carried):
    """Where a memory holds its streams."""
    del carried
    return models.Memory(values=1, valid=0)


def prepare(values: Mapping[str, Any], workdir: str) -> training.Run:
  """Checks the flags, loads the data and traces; writes nothing yet."""
  check_values(values)
  text, test = (load(values, split) for split in ('train',
                                                  values['eval_split']))
  task = make_task(values, len(text.vocabulary))
  problem = task.problem
  check_length(problem, text.tokens, test.tokens)
  index, count = devices.part(values['model_parallel'])
  part = {'length': problem.segment_length, 'process_index': index,
          'process_count': count}
  return training.make_run(
      values, workdir, task, values['train_steps'],
      train_batches=lambda start: input_pipeline.train_batches(
          text.tokens, batch_size=problem.batch_size, step=start, **part),
      eval_batches=lambda: input_pipeline.eval_batches(
          test.tokens, batch_size=problem.eval_batch_size, **part),
      units=('tokens', problem.batch_size * problem.segment_length),
      data=text.fingerprint)


def without_data(values: Mapping[str, Any]) -> tuple[tasks.Task, int]:
  """The task and its length by the corpus's published number of words."""
  check_values(values)
  words = input_pipeline.DATASETS[values['dataset']].vocabulary_size
  if level(values) == 'word' and words <= 256:
    raise ValueError(f'`level` (=word): how many words {values["dataset"]} has '
                     'is known from its text alone.')
  size = 256 if level(values) == 'byte' else words
  return make_task(values, size), values['train_steps']


def check_length(problem: Prediction, tokens, test_tokens) -> None:
  """Raises ValueError if a text has not enough for a batch."""
  needed = problem.batch_size * problem.segment_length
  if len(tokens) <= needed:
    raise ValueError(
        f'`batch_size` (={problem.batch_size}) times `segment_length` '
        f'(={problem.segment_length}) must be less than the {len(tokens)} '
        'tokens of the text.')
  if len(test_tokens) < 2:
    raise ValueError('`eval_split`: its text must have at least 2 tokens; it '
                     f'has {len(test_tokens)}.')


def check_values(values: Mapping[str, Any]) -> None:
  """Raises ValueError for a flag out of range that no other file checks."""
  run_flags.check_values(values)
  if values['eval_batch_size'] is not None:
    devices.check_batch_size(values['eval_batch_size'],
                             values['model_parallel'], 'eval_batch_size')


# Kept in memory for a program that trains several times.
_load = functools.lru_cache(2)(input_pipeline.load)


def load(values: Mapping[str, Any], split: str) -> input_pipeline.Text:
  """A split of the text of the flags."""
  return _load(values['dataset'], split, level=values['level'],
               data_dir=values['data_dir'], text_file=values['text_file'])


def level(values: Mapping[str, Any]) -> str:
  """What a token is: of --level, or the data set's own."""
  return values['level'] or input_pipeline.DATASETS[values['dataset']].level


def make_task(values: Mapping[str, Any], vocab_size: int) -> tasks.Task:
  """Problem, method and optimizer of the flags.

  The problem: the network, and how much text it sees at a time.
  """
  preset = models.MODELS[values['model']]
  lengths = {flag: getattr(preset, flag) if values[flag] is None
             else values[flag] for flag in LENGTHS}
  model = models.create(
      values['model'], vocab_size=vocab_size, dropout=values['dropout'],
      width=values['width'], activation_sparsity=values['abs_top_k'],
      dtype=jnp.bfloat16 if values['bfloat16'] else jnp.float32)
  problem = Prediction(
      model, level(values), values['batch_size'],
      values['eval_batch_size'] or values['batch_size'], **lengths)
  return training.make_task(problem, values, values['train_steps'],
                            {'embedding$': (1,)})


def metric(values: Mapping[str, Any]) -> str:
  return 'bits_per_character' if level(values) == 'byte' else 'perplexity'


BINARY = training.Binary('experiments.language.train', prepare, metric)
# As in experiments.image.train.
train = functools.partial(training.train, BINARY)
describe = functools.partial(training.describe, without_data)
run_config = functools.partial(run_flags.run_config, __name__, NOT_OF_THE_RUN)


def sample(values: Mapping[str, Any], count: int, prompt: str,
           temperature: float) -> str:
  """What the network of a run writes after a prompt, the prompt included."""
  run = prepare(values, values['workdir'] or run_flags.workdir_name(values))
  state, problem = training.last_state(run), run.task.problem
  vocabulary = load(values, 'train').vocabulary
  first = jnp.asarray(vocabulary.encode(prompt), jnp.int32)
  tokens = models.generate(
      problem.model, sparse_jax.dense_weights(run.task.method, state.params,
                                              state.opt_state),
      first, count=count, memory_length=problem.eval_memory_length,
      temperature=temperature, key=jax.random.key(values['seed']))
  return vocabulary.decode(jax.device_get(jnp.concatenate([first, tokens])))


def main(argv):
  count, prompt, temperature = (flags.FLAGS[name].value
                                for name in NOT_OF_THE_RUN)
  if count < 0 or not temperature >= 0 or not prompt:
    raise app.UsageError('--sample and --sample_temperature must be at least '
                         '0, and --prompt must not be empty')
  training.main(BINARY, run_config, argv)
  if count:
    text = sample(run_config(), count, prompt, temperature)
    print(text if jax.process_index() == 0 else '', flush=True)


if __name__ == '__main__':
  programs.run(main)
