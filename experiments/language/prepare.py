"""Prepares a corpus of the language experiment from its published files.

Neither network nor TensorFlow is used: fetch the files first, by any means,
into a folder, and name it:

  python -m experiments.language.prepare --dataset=enwik8 --source=DIR

  dataset      what the folder must hold
  stdlib       nothing: it is the library of the Python that runs, leave out
               --source
  enwik8       enwik8 or enwik8.zip
  text8        text8 or text8.zip
  wikitext2    wikitext-2-v1.zip, or wiki.{train,valid,test}.tokens, or
               {train,valid,test}.txt
  wikitext103  the same, of wikitext-103

A text of your own needs no preparing: train with --dataset=text
--text_file=FILE.

The bytes of the text are written, as array_record, to
<data_dir>/<dataset>/<version>, a few seconds per 100 MB; those of stdlib
to <data_dir>/stdlib_<version of Python>/<version>. A corpus that is there is
left as it is. Nothing half-written is left where a corpus is looked for; a
killed run may leave a scratch folder <data_dir>/.<dataset>.*, which is to be
deleted by hand.
"""

from absl import app
from absl import flags

from experiments import programs

with programs.extra():
  from experiments import datasets
  from experiments.language import corpora

_DATASET = flags.DEFINE_string(
    'dataset', None,
    f'Which corpus: one of {", ".join(sorted(corpora.BUILDERS))}.',
    required=True)
_SOURCE = flags.DEFINE_string(
    'source', None, 'Folder with the published files; stdlib needs none.')
_DATA_DIR = flags.DEFINE_string(
    'data_dir', None, 'Folder of all prepared sets. Default: $TFDS_DATA_DIR or '
    '~/tensorflow_datasets.')


def run(dataset: str, source: str | None, data_dir: str | None) -> str:
  """Prepares one corpus and returns a sentence on what was done."""
  data_dir = data_dir or datasets.default_data_dir()
  found = datasets.find(corpora.builder_class(dataset).name, data_dir)
  if found:
    return f'{dataset} is already prepared in {found}.'
  return f'Prepared {dataset} in {corpora.prepare(dataset, source, data_dir)}.'


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  try:
    print(run(_DATASET.value, _SOURCE.value, _DATA_DIR.value))
  except (ValueError, OSError) as error:
    programs.stop(f'not prepared: {error}')


if __name__ == '__main__':
  programs.run(main)
