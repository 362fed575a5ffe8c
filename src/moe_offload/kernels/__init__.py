"""Computing an expert or a dense matrix: C++ for the CPU, Triton for the GPU, torch as oracle."""
