"""What does an operation erase, and with which evidence?"""
