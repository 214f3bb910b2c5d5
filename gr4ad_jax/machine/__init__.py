"""What a program runs on: devices, processes, memory, files and buckets, the terminal."""
