"""The kernels: operations on plain arrays, one idea a file. The public ones are in `dispatch`."""
