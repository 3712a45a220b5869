"""What the experiments share: the frame, measurements, drawing, and the report made of them."""
