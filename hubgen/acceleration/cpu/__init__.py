"""What a CPU computes faster: matrix products and convolutions with packed weights, Winograd's method, upsampling."""
