"""What stands around the program: hardware, sensors, CUDA streams, the terminal."""
