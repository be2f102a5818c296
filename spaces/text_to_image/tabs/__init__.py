"""The tabs of the page, a file each, and the desk where their requests are checked."""
