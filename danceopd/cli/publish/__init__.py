"""`danceopd push`: what would be sent is shown, and then sent."""
