"""Laws of experiments/reporting.py; that plots.py and pictures.py draw."""

import contextlib
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
from experiments import pictures
from experiments import plots
from experiments import reporting
import jax
import jax.numpy as jnp
import numpy as np
import tqdm.std

_ROOT = pathlib.Path(__file__).parents[1]


class ReportingTestCase(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    # Not create_tempdir: it wants parsed flags, which pytest has none of.
    scratch = tempfile.TemporaryDirectory()
    self.addCleanup(scratch.cleanup)
    self.directory = pathlib.Path(scratch.name)


class JsonlWriterTest(ReportingTestCase):

  def setUp(self):
    super().setUp()
    self.path = self.directory / 'sub' / 'metrics.jsonl'

  def write(self, steps, start_step=0):
    with contextlib.closing(
        reporting.JsonlWriter(self.path, start_step)) as writer:
      for step in steps:
        writer.write_scalars(step, {'loss': 1 / (step + 1)})

  def rows(self):
    return [{**row, 'time': 0} for row in reporting.read_jsonl(self.path)]

  @parameterized.product(
      resumed=[0, 1, 4, 7],
      torn=['', '{"step": 7, "ti', '{"step": 7}', '\xff', '7'])
  def test_killed_and_resumed_file_is_that_of_an_unbroken_run(
      self, resumed, torn):
    self.write(range(10))
    want = self.rows()
    self.path.unlink()
    self.write(range(7))
    with self.path.open('a', encoding='latin-1') as file:
      file.write(torn)
    self.write(range(resumed, 10), start_step=resumed)
    self.assertEqual(self.rows(), want)
    self.assertEndsWith(self.path.read_text(), '\n')

  def test_a_last_row_that_lacks_only_its_newline_is_kept(self):
    self.write(range(3))
    want = self.rows()
    self.path.write_text(self.path.read_text().rstrip())
    self.write([3], start_step=3)
    self.assertEqual(self.rows()[:3], want)
    self.assertLen(self.rows(), 4)

  def test_each_row_is_on_disk_when_the_call_returns(self):
    writer = reporting.JsonlWriter(self.path)
    writer.write_scalars(0, {'loss': 1.})
    self.assertLen(self.rows(), 1)
    writer.close()

  def test_every_line_is_valid_json(self):
    values = {'nan': math.nan, 'inf': -math.inf, 'int': np.int64(3),
              'jax': jnp.float32(0.5), 'count': jnp.int32(7), 'yes': True,
              'half': jnp.bfloat16(1.5)}
    with contextlib.closing(reporting.JsonlWriter(self.path)) as writer:
      writer.write_scalars(np.int32(4), values)
    row = json.loads(self.path.read_text(), parse_constant=self.fail)
    self.assertGreater(row.pop('time'), 0)
    self.assertEqual(row, {'step': 4, 'nan': None, 'inf': None, 'int': 3,
                           'jax': 0.5, 'count': 7, 'yes': True, 'half': 1.5})
    self.assertIsInstance(row['count'], int)
    self.assertTrue(math.isnan(reporting.read_jsonl(self.path)[0]['inf']))

  @parameterized.named_parameters(
      ('text', '0.5'), ('array', jnp.zeros(2)), ('none', None))
  def test_refuses_what_is_no_number(self, value):
    with contextlib.closing(reporting.JsonlWriter(self.path)) as writer:
      with self.assertRaisesRegex(ValueError, r'scalar loss \(=.* a number'):
        writer.write_scalars(0, {'loss': value})
    self.assertEmpty(self.rows())

  def test_a_broken_line_in_the_middle_is_an_error_and_changes_nothing(self):
    self.path.parent.mkdir()
    self.path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    before = self.path.read_bytes()
    for use in (reporting.read_jsonl, reporting.JsonlWriter):
      with self.assertRaisesRegex(ValueError, r"line 2 \(='nonsense'\)"):
        use(self.path)
    self.assertEqual(self.path.read_bytes(), before)


class TensorBoardWriterTest(ReportingTestCase):

  def read(self):
    from tensorboard.backend.event_processing import event_accumulator
    events = event_accumulator.EventAccumulator(
        str(self.directory), size_guidance={'scalars': 0})
    return events.Reload()

  def test_what_is_written_reads_back(self):
    with contextlib.closing(reporting.TensorBoardWriter(
        self.directory)) as writer:
      writer.write_scalars(3, {'loss': jnp.float32(0.25)})
    scalar, = self.read().Scalars('loss')
    self.assertEqual((scalar.step, scalar.value), (3, 0.25))

  def test_resuming_forgets_later_steps(self):
    for start, stop in ((1, 6), (4, 8)):
      with contextlib.closing(reporting.TensorBoardWriter(
          self.directory, start)) as writer:
        for step in range(start, stop):
          writer.write_scalars(step, {'loss': start})
    got = [(event.step, event.value) for event in self.read().Scalars('loss')]
    self.assertEqual(got, [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4),
                           (7, 4)])


class WritersTest(ReportingTestCase):

  def test_writes_both_files(self):
    with reporting.open_writers(self.directory / 'run') as write:
      write(1, {'loss': 2.})
    self.assertLen(reporting.read_jsonl(
        self.directory / 'run' / 'metrics.jsonl'), 1)
    self.assertLen(list((self.directory / 'run' / 'tensorboard').iterdir()), 1)

  def test_only_the_first_process_writes(self):
    with mock.patch.object(jax, 'process_index', return_value=1):
      with reporting.open_writers(self.directory / 'run') as write:
        write(1, {'loss': 2.})
    self.assertEmpty(list(self.directory.iterdir()))

  def test_tensorboard_is_optional(self):
    with mock.patch.dict(sys.modules, {'tensorboard.compat.proto': None}):
      with reporting.open_writers(self.directory) as write:
        write(1, {'loss': 2.})
    self.assertEqual([p.name for p in self.directory.iterdir()],
                     ['metrics.jsonl'])


class ProgressTest(ReportingTestCase):

  def test_a_bar_goes_on_where_the_run_was(self):
    with (contextlib.redirect_stderr(io.StringIO()) as stream,
          mock.patch.object(stream, 'isatty', return_value=True)):
      with reporting.progress(10, 4) as bar:
        bar.set_postfix({'loss': .5}, refresh=False)
        bar.update(6)
    self.assertRegex(stream.getvalue(), r'100%.*10/10.*loss=0\.5')

  def test_a_log_has_a_line_a_minute(self):
    with (contextlib.redirect_stderr(io.StringIO()) as stream,
          mock.patch.object(tqdm.std, 'time') as now,
          self.assertLogs(reporting.__name__, 'INFO') as log):
      now.return_value = 0.
      with reporting.progress(400, 40) as bar:
        for second in range(1, 131):
          now.return_value = float(second)
          bar.set_postfix({'loss': second}, refresh=False)
          bar.update()
    self.assertEmpty(stream.getvalue())
    self.assertEqual([record.getMessage() for record in log.records], [
        'step 100 of 400 (25%),  1.00 steps/s, 05:00 left, loss=60',
        'step 160 of 400 (40%),  1.00 steps/s, 04:00 left, loss=120',
        'step 170 of 400 (42%),  1.00 steps/s, 03:50 left, loss=130'])

  @parameterized.parameters(400, None)
  def test_a_log_has_no_line_of_what_is_not_known(self, total):
    """The rate before the first step; how many there are, in pruning."""
    with (mock.patch.object(tqdm.std, 'time') as now,
          self.assertLogs(reporting.__name__, 'INFO') as log):
      now.return_value = 0.
      with reporting.progress(total, 4) as bar:
        now.return_value = 3.
        bar.total = 10
        bar.update(6)
    self.assertEqual([record.getMessage() for record in log.records],
                     ['step 10 of 10 (100%),  2.00 steps/s, 00:00 left'])

  def test_other_processes_show_nothing(self):
    with (contextlib.redirect_stderr(io.StringIO()) as stream,
          mock.patch.object(jax, 'process_index', return_value=1),
          reporting.progress(10) as bar):
      bar.update(10)
    self.assertEmpty(stream.getvalue())


class WriteJsonTest(ReportingTestCase):

  def test_numbers_of_every_kind(self):
    path = self.directory / 'result.json'
    reporting.write_json(path, {
        'accuracy': jnp.float32(0.5), 'nan': [math.nan, np.float32(np.inf)],
        'layers': {'a': np.arange(2)}, 'name': 'rigl', 'none': None})
    self.assertEqual(json.loads(path.read_text(), parse_constant=self.fail), {
        'accuracy': 0.5, 'nan': [None, None], 'layers': {'a': [0, 1]},
        'name': 'rigl', 'none': None})

  def test_a_failure_keeps_the_old_file(self):
    path = self.directory / 'result.json'
    reporting.write_json(path, {'a': 1})
    with self.assertRaises(TypeError):
      reporting.write_json(path, {'a': object()})
    with mock.patch.object(os, 'replace', side_effect=OSError):
      with self.assertRaises(OSError):
        reporting.write_json(path, {'a': 2})
    self.assertEqual(json.loads(path.read_text()), {'a': 1})
    self.assertEqual(os.listdir(self.directory), ['result.json'])

  def test_no_link_is_followed(self):
    """Neither at the place nor at the name that was once used before it."""
    victim = self.directory / 'victim'
    victim.write_text('mine')
    path = self.directory / 'result.json'
    for name in ('result.json', 'result.json.tmp'):
      (self.directory / name).symlink_to(victim)
    reporting.write_json(path, {'a': 1})
    self.assertEqual(victim.read_text(), 'mine')
    self.assertFalse(path.is_symlink())


class MarkdownTableTest(parameterized.TestCase):

  def test_columns_are_aligned_and_gaps_blank(self):
    rows = [{'method': 'dense', 'accuracy': 76.81}, {
        'method': 'a|b', 'accuracy': 5, 'note': None}]
    self.assertEqual(
        reporting.markdown_table(rows, formats={'accuracy': '.1f'}),
        '| method | accuracy | note |\n'
        '|:-------|---------:|:-----|\n'
        '| dense  |     76.8 |      |\n'
        '| a\\|b   |      5.0 |      |\n')

  def test_columns_choose_and_order_and_formats_may_be_functions(self):
    rows = [{'a': 1, 'b': 2, 'c': 3}]
    self.assertEqual(
        reporting.markdown_table(rows, ['c', 'a'], {'a': lambda x: f'{x} ± 0'}),
        '|   c |     a |\n|----:|------:|\n|   3 | 1 ± 0 |\n')

  def test_no_rows(self):
    self.assertEqual(reporting.markdown_table([], ['a']),
                     '| a   |\n|:----|\n')

  def test_refuses_a_format_of_no_column(self):
    self.assertEqual(reporting.markdown_table([{'a': 1}]),
                     reporting.markdown_table([{'a': 1}], formats={'b': '.1f'}))


class PlotsTest(ReportingTestCase):

  def assert_png(self, path):
    self.assertEqual(path.read_bytes()[:8], b'\x89PNG\r\n\x1a\n')
    self.assertEqual([p.name for p in self.directory.iterdir()], [path.name])

  @parameterized.named_parameters(
      ('with_masks', True), ('without_masks', False))
  def test_training_curves(self, masks):
    rows = [{'step': step, 'train_accuracy': step / 100} for step in range(50)]
    rows += [{'step': 25, 'test_accuracy': 0.2, 'train_accuracy': math.nan}]
    if masks:
      rows += [{'step': 20, 'churn_min': 0., 'churn_mean': .1, 'churn_max': .2,
                'sparsity': .5, 'effective_sparsity': .9}]
    path = self.directory / 'curves.png'
    pictures.training_curves(rows, path, 'A run')
    self.assert_png(path)

  def draw(self, rows, **options):
    path = self.directory / 'lines.png'
    plots.lines(rows, path, 'Title', **{'xlabel': 'x', 'ylabel': 'y'} | options)
    self.assert_png(path)
    return path.read_bytes()

  @parameterized.parameters('linear', 'log', 'sparsity')
  def test_lines(self, scale):
    rows = [{'row': f'method {i}', 'x': x, 'ours': 70. + i, 'deviation': .5}
            for i in range(14) for x in (80., 90., 98.)]
    rows.append({'row': 'dense', 'x': 0., 'ours': 77.})
    self.draw(rows, scale=scale, published=False)
    self.draw(rows[:1], scale=scale)  # One point has no range to scale.

  def test_what_is_published_is_drawn_if_asked_for(self):
    row = {'row': 'RigL', 'published': 74.6, 'published_x': .23, 'ours': None,
           'x': .23, 'deviation': None}
    theirs = self.draw([row])
    self.assertNotEqual(theirs, self.draw([row | {'ours': 70.}]))
    self.assertNotEqual(theirs, self.draw([row], published=False))

  def test_points_far_from_all_others_are_left_out(self):
    axes = mock.Mock()
    rows = [{'row': 'a', 'x': x, 'ours': 70. + x} for x in range(8)]
    plots._leave_out_failures(axes, rows, False)
    axes.set_ylim.assert_not_called()
    plots._leave_out_failures(axes, rows + [{'row': 'b', 'x': 1, 'ours': 9.}],
                              False)
    low, high = axes.set_ylim.call_args.args
    self.assertBetween(low, 68., 70.)
    self.assertBetween(high, 77., 79.)
    self.assertEqual(axes.text.call_args.args[2], '1 of 9 points lie outside')

  @parameterized.parameters('linear', 'log', 'sparsity')
  def test_the_dense_line_bears_its_name(self, scale):
    rows = [{'row': 'dense', 'x': 100., 'ours': 77.}]
    rows += [{'row': 'rigl', 'x': x, 'ours': 70.} for x in (20., 10.)]
    with mock.patch.object(plots, '_name_across') as named:
      self.draw(rows, scale=scale, published=False)
    self.assertEqual(named.call_args.args[1], {'dense': (77., plots.BLUE)})

  def test_names_across_are_kept_apart(self):
    axes = mock.Mock(**{'get_ylim.return_value': (0., 100.)})
    plots._name_across(axes, {'a': (50., 'k'), 'b': (51., 'k'), 'c': (200., '')
                              })
    places = {call.args[2]: call.args[1] for call in axes.text.call_args_list}
    self.assertEqual(places, {'a': 50., 'b': 54.})

  def test_layer_density(self):
    path = self.directory / 'density.png'
    pictures.layer_density([{'layer': 'conv', 'forward_density': 0.1,
                             'effective_density': .05, 'collapsed': True,
                             'backward_density': 0.2}], path)
    self.assert_png(path)

  def test_masks(self):
    path = self.directory / 'masks.png'
    kept = np.eye(4, dtype=np.float32)
    pictures.masks({f'layer {i}': (kept, kept * i / 4) for i in range(5)}, path)
    self.assert_png(path)

  @parameterized.parameters((30, True), (3, False))
  def test_receptive_fields(self, units, read):
    path = self.directory / 'fields.png'
    fields = np.random.default_rng(0).normal(size=(units, 4, 4))
    pictures.receptive_fields(fields, abs(fields[0]) if read else None, path)
    self.assert_png(path)

  @parameterized.named_parameters(
      ('curves', lambda path: pictures.training_curves([], path, '')),
      ('lines', lambda path: plots.lines([], path, '', xlabel='', ylabel='')),
      ('density', lambda path: pictures.layer_density([], path)))
  def test_refuses_no_rows(self, draw):
    with self.assertRaisesRegex(ValueError, r'rows \(=\[\]\)'):
      draw(self.directory / 'nothing.png')

  def test_running_mean_is_narrower_at_its_ends(self):
    values = np.arange(200.)
    means = pictures._running_mean(values)
    self.assertAlmostEqual(means[0], values[:3].mean())
    self.assertAlmostEqual(means[100], values[98:103].mean())


class ImportTest(absltest.TestCase):

  def test_importing_is_cheap(self):
    code = ('import sys; from experiments import checkpointing, pictures, '
            'reporting; print({"orbax", "matplotlib", "tensorboard", '
            '"tensorflow", "PIL"} & set(sys.modules))')
    output = subprocess.run([sys.executable, '-c', code], cwd=_ROOT, check=True,
                            stdout=subprocess.PIPE, text=True).stdout
    self.assertEqual(output, 'set()\n')


if __name__ == '__main__':
  absltest.main()
