"""What the CUDA kernels share: device.cuh (the only inline PTX), numeric.cuh, philox.cuh, and launch.py.

A kernel is compiled by NVRTC for a GPU, and by g++ for the tests' emulator (with TTR_HOST defined): device.cuh is where
the two differ. Importing this package imports neither CuPy nor a compiler.
"""
