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

from experiments import programs

with programs.extra():
  from experiments import preparing
  from experiments.language import corpora

if __name__ == '__main__':
  preparing.start(corpora, 'stdlib')
