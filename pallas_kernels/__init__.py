"""The kernels: operations on plain arrays, a folder each. The public ones are in `dispatch`."""
