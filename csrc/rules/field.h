// How a record of hyper-parameters is declared, so that bindings unpack it in the order of its declaration.
#pragma once

namespace cts {

// A field of a record: its name in Python, and its place in C++.
template <class Record, class T> struct Field {
  const char* name;
  T Record::* member;

  constexpr Field(const char* name, T Record::* member) : name(name), member(member) {}
};

}  // namespace cts
