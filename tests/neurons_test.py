"""The picture of one unit: what it reads and writes, by hand."""

import os
import tempfile

from absl.testing import absltest
import numpy as np

from experiments import pictures
from tests import own_flags

with own_flags.OwnFlags():  # The image binary has the same names.
  from experiments.language import neurons


def _weights():
  """Four tokens, three channels, two units."""
  return {
      'layer_0': {'dense_1': {'kernel': np.array([[0., 2.], [1., 0.],
                                                  [0., -3.]])},
                  'dense_2': {'kernel': np.array([[.1, 0., 0.],
                                                  [0., 1., 0.]])}},
      'vocabulary': {'head': {'embedding': np.array(
          [[1., 0., 0.], [0., 1., 0.], [0., 0., -1.], [9., 9., 9.]])}}}


class LookTest(absltest.TestCase):

  def test_it_is_read_off_the_weights(self):
    unit = neurons.look(_weights(), {0: 'a', 1: 'b', 2: 'c'}, 0, 1, 2)
    self.assertEqual(unit.channels, [('2', -3.), ('0', 2.)])
    self.assertEqual(unit.reads, [('c', 3.), ('a', 2.)])
    self.assertEqual(unit.writes, [('b', 1.), ('a', 0.)])
    self.assertIn('reads 2 channels', neurons.describe(unit))

  def test_without_a_number_it_is_the_one_that_passes_on_most(self):
    unit = neurons.look(_weights(), {0: 'a', 1: 'b', 2: 'c'}, 0, None, 2)
    self.assertEqual(unit.number, 1)

  def test_what_is_not_there_is_named(self):
    names = {0: 'a'}
    with self.assertRaisesRegex(ValueError, '`layer`'):
      neurons.look(_weights(), names, 1, 0, 2)
    with self.assertRaisesRegex(ValueError, '`neuron`'):
      neurons.look(_weights(), names, 0, 2, 2)
    weights = _weights()
    weights['vocabulary']['head']['embedding'] = np.ones((4, 2))
    with self.assertRaisesRegex(ValueError, '`weights`'):
      neurons.look(weights, names, 0, 0, 2)

  def test_picture_is_written(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = os.path.join(folder, 'neuron.png')
    pictures.neuron(neurons.look(_weights(), {0: 'a', 1: '$'}, 0, 1, 2), path)
    self.assertGreater(os.path.getsize(path), 1000)


if __name__ == '__main__':
  absltest.main()
