"""Prepares a data set of the image experiment from its published files.

Neither network nor TensorFlow is used: fetch the files first, by any means,
into a folder, and name it:

  python -m experiments.image.prepare --dataset=cifar10 --source=DIR

  dataset        what the folder must hold
  digits         nothing: the images come with scikit-learn, leave out --source
  mnist          {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz
  fashion_mnist  the same four names
  cifar10        cifar-10-batches-py/ or cifar-10-python.tar.gz
  cifar100       cifar-100-python/ or cifar-100-python.tar.gz

The set is written, as array_record, to where TFDS would put it, in under a
minute and about as much disk as its pixels take (180 MB for CIFAR). One that
TFDS prepared as array_record is left as it is, and is used.

ImageNet (imagenet2012) is prepared by TFDS, with TensorFlow, once, and from
then on read without it: put its two tar files (144 GB) into
<data_dir>/downloads/manual and run

  tfds build imagenet2012 --data_dir=DIR --file_format=array_record

The format matters: TFDS's default, tfrecord, cannot be read at random.
"""

from experiments import programs

with programs.extra():
  from experiments import datasets
  from experiments.image import builders

if __name__ == '__main__':
  datasets.start(builders, 'digits')
