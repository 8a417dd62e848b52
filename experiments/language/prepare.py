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

The bytes of the text are written, as array_record, to where TFDS would put
them; those of stdlib under a name that has the version of Python in it.
"""

from experiments import programs

with programs.extra():
  from experiments import datasets
  from experiments.language import corpora

if __name__ == '__main__':
  datasets.start(corpora, 'stdlib')
