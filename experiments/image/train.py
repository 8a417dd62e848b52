"""Trains an image classifier sparse, from the first step to the last.

  python -m experiments.image.train

trains LeNet-300-100 with Top-KAST at 90% on scikit-learn's handwritten digits:
no download, well under a minute on two CPU cores, about 96% test accuracy.

  python -m experiments.image.train --dataset=cifar10 --data_dir=DIR \
      --model=resnet20 --method=rigl --sparsity=0.95 --allocation=erk

trains on a data set prepared by TFDS or by experiments.image.prepare. The
defaults follow the CIFAR recipes (batch 128, Nesterov momentum, cosine decay);
RigL's ImageNet one, whose first layer alone is dense, is

  --dataset=imagenet2012 --model=resnet50 --batch_size=4096 --train_steps=32000
  --learning_rate=1.6 --lr_schedule=step --warmup_share=0.049
  --lr_drops=0.293,0.684,0.879 --weight_decay=1e-4 --label_smoothing=0.1
  --method=rigl --sparsity=0.8 --skip_step --update_end=25000
  --dense_layers=stem

which nobody has run with this program yet. Top-KAST's has the same schedule,
and the last layer dense too: --dense_layers=stem,head. Data parallel over all
devices, and with --distributed over those of several hosts; --model_parallel
splits the parameters too. Killed and started again with the same flags, a run
continues bit for bit; stopped by SIGTERM it saves first and exits with status
75. Bad flags are status 2 and leave nothing behind.

Leaves in --workdir: metrics.jsonl, tensorboard/, checkpoints/, and once the run
is complete training.png, layers.png, masks.png and first_layer.png (where there
are any), report.html, which shows them, and result.json. Started again then, it
only prints its report.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import optax

from experiments import batching
from experiments import devices
from experiments import programs
from experiments import run_flags
from experiments import tasks
from experiments import training
from experiments.image import input_pipeline
from experiments.image import models

flags.DEFINE_enum('dataset', 'digits', sorted(input_pipeline.DATASETS),
                  'What to train on. All but digits must be prepared before.')
flags.DEFINE_enum('model', 'mlp', sorted(models.MODELS), 'The network.')
flags.DEFINE_float('width', 1., 'Multiplier of the network\'s channels.',
                   lower_bound=0, upper_bound=1e6)
flags.DEFINE_float('dropout', 0., 'Dropout rate, where the network has any.')
flags.DEFINE_float('train_epochs', None, 'Length of the run in epochs. '
                   'Default: 100.')
flags.DEFINE_float('label_smoothing', 0., 'Share of the label spread over all '
                   'classes.', lower_bound=0, upper_bound=1)
flags.DEFINE_bool('augment', True, 'Crop and flip as the papers do.')
run_flags.define_flags(batch_size=128, examples='Images')

FREE = run_flags.FREE  # Flags that a continued run may change.


@dataclasses.dataclass(frozen=True)
class Classification(tasks.Problem):
  """What is learned."""

  model: Any
  dataset: str
  label_smoothing: float

  metrics = ('accuracy',)

  def init(self, key):
    """Parameters, and the statistics of batch norm."""
    images = jnp.zeros((1, *self.spec.image_shape))
    variables = self.model.init(key, images, train=False)
    return variables['params'], variables.get('batch_stats', {})

  def loss(self, weights, batch_stats, batch, key):
    """Mean cross-entropy, with the new batch statistics and the accuracy."""
    logits, updates = self._apply_in_training(weights, batch_stats, batch, key)
    labels = optax.smooth_labels(
        jax.nn.one_hot(batch['label'], logits.shape[-1]), self.label_smoothing)
    loss = optax.softmax_cross_entropy(logits, labels).mean()
    accuracy = jnp.mean(logits.argmax(-1) == batch['label'])
    return loss, (updates.get('batch_stats', {}), {'accuracy': accuracy})

  def log_probabilities(self, weights, batch_stats, batch, key):
    """Of every class, as `loss` sees them: what a student learns from."""
    logits, _ = self._apply_in_training(weights, batch_stats, batch, key)
    return jax.nn.log_softmax(logits)

  def score(self, weights, batch_stats, carry, batch):
    """Summed loss, hits and weights of one batch."""
    logits = self.apply(weights, batch_stats, batch['image'], train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch['label'])
    hits = logits.argmax(-1) == batch['label']
    weight = batch['weight']
    return carry, {'loss': jnp.sum(losses * weight),
                   'accuracy': jnp.sum(hits * weight),
                   'weight': jnp.sum(weight)}

  def examples(self, size):
    """Shapes of the batch statistics, and of a batch."""
    shape = jax.ShapeDtypeStruct
    _, batch_stats = jax.eval_shape(self.init, jax.random.key(0))
    return batch_stats, {
        'image': shape((size, *self.spec.image_shape), jnp.uint8),
        'label': shape((size,), jnp.int32)}

  def apply(self, weights, batch_stats, images, **options):
    """What the model gives for images as the data set has them."""
    return self.model.apply(
        {'params': weights, 'batch_stats': batch_stats},
        input_pipeline.normalise(images, self.dataset), **options)

  def _apply_in_training(self, weights, batch_stats, batch, key):
    return self.apply(weights, batch_stats, batch['image'], train=True,
                      mutable=['batch_stats'], rngs={'dropout': key})

  def inference(self, batch_stats):
    """What accounting counts: one image through the model."""
    def apply(weights, images):
      return self.model.apply({'params': weights, 'batch_stats': batch_stats},
                              images, train=False)
    return apply, jax.ShapeDtypeStruct((1, *self.spec.image_shape),
                                       jnp.float32)

  @property
  def spec(self) -> input_pipeline.Dataset:
    return input_pipeline.DATASETS[self.dataset]


def prepare(values: Mapping[str, Any], workdir: str) -> training.Run:
  """Checks the flags, loads the data and traces; writes nothing yet."""
  run_flags.check_values(values)
  eval_split = input_pipeline.DATASETS[values['dataset']].eval_split
  data, test = (load(values, split) for split in ('train', eval_split))
  train_steps = run_length(values, data.num_examples)
  index, count = devices.part(values['model_parallel'])
  part = {'batch_size': values['batch_size'], 'process_index': index,
          'process_count': count}
  return training.make_run(
      values, workdir, make_task(values, train_steps), train_steps,
      train_batches=lambda start: batching.prefetch(
          input_pipeline.train_batches(
              data, step=start, seed=values['seed'], augment=values['augment'],
              **part)),
      eval_batches=lambda: input_pipeline.eval_batches(test, **part),
      units=('examples', values['batch_size']))


def without_data(values: Mapping[str, Any]) -> tuple[tasks.Task, int]:
  """The task and its length by the data set's published size."""
  run_flags.check_values(values)
  steps = run_length(values, input_pipeline.DATASETS[
      values['dataset']].num_train)
  return make_task(values, steps), steps


def run_length(values: Mapping[str, Any], num_examples: int) -> int:
  """Steps of the run, from --train_steps or --train_epochs."""
  steps, epochs = values['train_steps'], values['train_epochs']
  batch_size = values['batch_size']
  if batch_size > num_examples:
    raise ValueError(f'`batch_size` (={batch_size}) must not be above the '
                     f'{num_examples} examples of {values["dataset"]}.')
  if steps is not None and epochs is not None:
    raise ValueError(f'`train_steps` (={steps}) and `train_epochs` (={epochs})'
                     ' exclude each other.')
  if steps is None:
    epochs = 100. if epochs is None else epochs
    if not 0 < epochs < math.inf:
      raise ValueError(f'`train_epochs` (={epochs}) must be finite and above '
                       '0.')
    steps = math.ceil(epochs * (num_examples // batch_size))
  return steps


def make_task(values: Mapping[str, Any], train_steps: int) -> tasks.Task:
  """Problem, method and optimizer of the flags."""
  model = models.create(
      values['model'], width=values['width'], dropout=values['dropout'],
      num_classes=input_pipeline.DATASETS[values['dataset']].num_classes,
      dtype=jnp.bfloat16 if values['bfloat16'] else jnp.float32)
  problem = Classification(model, values['dataset'], values['label_smoothing'])
  return training.make_task(problem, values, train_steps)


# Kept in memory for a program that trains several times.
_load = functools.lru_cache(2)(input_pipeline.load)


def load(values: Mapping[str, Any], split: str) -> input_pipeline.Split:
  """A split of the data set of the flags."""
  return _load(values['dataset'], split, values['data_dir'])


BINARY = training.Binary('experiments.image.train', prepare,
                         metric=lambda values: 'accuracy')
# Of values of flags by name: the run; its size, for which no data need be
# there. Of no argument: these values.
train = functools.partial(training.train, BINARY)
describe = functools.partial(training.describe, without_data)
run_config = functools.partial(run_flags.run_config, __name__)


def main(argv):
  training.main(BINARY, run_config, argv)


if __name__ == '__main__':
  programs.run(main)
