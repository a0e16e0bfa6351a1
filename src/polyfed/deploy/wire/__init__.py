"""What passes between server and client beside an algorithm's messages."""
