/*
 * nvrtc.cpp -- compilation at run time: the host's compiler makes a shared object of the source, against the test double.
 *
 * Test double: it shows no speed, no memory model, no real cuBLAS.  Owns the programs and, while one compiles, a private folder below $TMPDIR.
 * The "PTX" of a program is the shared object itself, behind a line with its size; driver.cpp loads it.
 *
 * The source is changed in two ways.  `extern __shared__ T name[];` becomes a pointer to the launch's dynamic memory.  Behind the source
 * comes a table of its kernels: those with C linkage by their name, as the real thing would find them, and name expressions.  Line numbers
 * stay; messages get NVRTC's form, name(line): error: text.
 */
#include "emu.h"

#include <map>
#include <regex>
#include <set>
#include <vector>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
#include "emu_nvrtc.h"
#include "nvrtc.h"

struct _nvrtcProgram {
  std::string source, name, log, image;
  std::map<std::string, std::string> headers;
  std::vector<std::string> expressions;
  bool compiled;
};

namespace hm_emu {

namespace {

auto &programs = *new std::set<nvrtcProgram>;

/* ====== Reading the source ====== */

bool is_word(char c) { return isalnum((unsigned char)c) || c == '_'; }

/* The source without comments and strings (blanks in their place, so that positions stay), but for "C" after extern. */
std::string without_noise(const std::string &s) {
  std::string t = s;
  for (size_t i = 0; i < s.size();) {
    size_t end = i + 1;
    if (s.compare(i, 2, "//") == 0) end = std::min(s.find('\n', i), s.size());
    else if (s.compare(i, 2, "/*") == 0) end = std::min(s.find("*/", i + 2), s.size() - 2) + 2;
    else if (s.compare(i, 3, "\"C\"") == 0) end = i + 3;
    else if (s[i] == '"' || s[i] == '\'') {
      while (end < s.size() && s[end] != s[i] && s[end] != '\n') end += s[end] == '\\' ? 2 : 1;
      end = std::min(end + 1, s.size());
    } else {
      i++;
      continue;
    }
    if (s.compare(i, 3, "\"C\"") != 0)
      for (size_t k = i; k < end; k++)
        if (t[k] != '\n') t[k] = ' ';
    i = end;
  }
  return t;
}

/* Words and single characters of a clean source. */
std::vector<std::string> tokens_of(const std::string &s) {
  std::vector<std::string> list;
  for (size_t i = 0; i < s.size();) {
    size_t end = i + 1;
    if (isspace((unsigned char)s[i])) {
      i++;
      continue;
    }
    if (s.compare(i, 3, "\"C\"") == 0) end = i + 3;
    else if (is_word(s[i]))
      while (end < s.size() && is_word(s[end])) end++;
    list.push_back(s.substr(i, end - i));
    i = end;
  }
  return list;
}

/* Name of the function declared from token i on: the word before the first parenthesis that is no attribute's. */
std::string function_name(const std::vector<std::string> &t, size_t i) {
  for (; i + 1 < t.size() && t[i] != ";" && t[i] != "{"; i++) {
    if (t[i + 1] != "(" || !is_word(t[i][0])) continue;
    if (t[i] != "__launch_bounds__" && t[i] != "__attribute__") return t[i];
    int depth = 0;
    for (i++; i < t.size(); i++) {
      depth += t[i] == "(" ? 1 : t[i] == ")" ? -1 : 0;
      if (!depth) break;
    }
  }
  return "";
}

/* Names of the kernels with C linkage. */
std::vector<std::string> c_kernels(const std::string &clean) {
  const std::vector<std::string> t = tokens_of(clean);
  std::vector<std::string> names;
  std::vector<bool> braces; /* is this one an extern "C" block? */
  bool c_block = false, c_next = false;
  for (size_t i = 0; i < t.size(); i++) {
    if (t[i] == "extern" && i + 1 < t.size() && t[i + 1] == "\"C\"") {
      c_next = true;
      i++;
      if (i + 1 < t.size() && t[i + 1] == "{") {
        braces.push_back(true);
        c_block = true;
        c_next = false;
        i++;
      }
    } else if (t[i] == "{") {
      braces.push_back(false);
      c_next = false;
    } else if (t[i] == "}") {
      if (!braces.empty()) {
        if (braces.back()) c_block = false;
        braces.pop_back();
      }
    } else if (t[i] == ";") {
      c_next = false;
    } else if (t[i] == "__global__" && (c_next || c_block)) {
      const std::string name = function_name(t, i + 1);
      if (!name.empty() && std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    }
  }
  return names;
}

std::string lowered(size_t i) { return "hm_emu_expression_" + std::to_string(i); }

/* The whole translation unit. */
std::string unit_of(const nvrtcProgram p) {
  static const std::regex dynamic(
      "extern\\s+__shared__\\s+((?:[A-Za-z_]\\w*(?:\\s*\\([^)]*\\))?\\s+)*?)([A-Za-z_]\\w*)\\s*\\[\\s*\\]\\s*;");
  const std::string clean = without_noise(p->source);
  std::string body = p->source;
  std::smatch m;
  std::string rest = body, changed;
  while (std::regex_search(rest, m, dynamic)) {
    std::string type = std::regex_replace(m[1].str(), std::regex("__align__\\s*\\([^)]*\\)"), "");
    changed += m.prefix().str() + type + " *const " + m[2].str() + " = (" + type + " *)hm_emu::table->dynamic();";
    for (char c : m[0].str())
      if (c == '\n') changed += '\n';
    rest = m.suffix().str();
  }
  body = changed + rest;
  std::string unit = "#define HM_EMU_MODULE_SOURCE 1\n#include \"emu_nvrtc.h\"\n#line 1 \"" + p->name + "\"\n" + body;
  unit += "\n#line 1 \"(table of kernels)\"\nstatic const hm_emu::entry hm_emu_kernels[] = {\n";
  for (const std::string &name : c_kernels(clean))
    unit += "  hm_emu::kernel_of<&::" + name + ">::make(\"" + name + "\"),\n";
  for (size_t i = 0; i < p->expressions.size(); i++)
    unit += "  hm_emu::kernel_of<(" + p->expressions[i] + ")>::make(\"" + lowered(i) + "\"),\n";
  unit +=
      "  {}};\n"
      "extern \"C\" __attribute__((visibility(\"default\"))) const hm_emu::entry *hm_emu_attach(const hm_emu::services *s, hm_emu::module_face *f) {\n"
      "  hm_emu::table = s;\n"
      "  *f = {{&threadIdx, &blockIdx, &blockDim, &gridDim, &hm_emu_epoch}, __start_hm_emu_shared, __stop_hm_emu_shared};\n"
      "  return hm_emu_kernels;\n"
      "}\n";
  return unit;
}

/* ====== Files ====== */

bool write_file(const std::string &path, const std::string &text) {
  FILE *const f = fopen(path.c_str(), "wb");
  if (!f) return false;
  const bool good = fwrite(text.data(), 1, text.size(), f) == text.size();
  return fclose(f) == 0 && good;
}

bool read_file(const std::string &path, std::string *text) {
  FILE *const f = fopen(path.c_str(), "rb");
  if (!f) return false;
  char buffer[65536];
  text->clear();
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, f)) > 0;) text->append(buffer, n);
  fclose(f);
  return true;
}

/* Runs a program with its messages in a file; its exit status, or -1. */
int run(const std::vector<std::string> &words, const std::string &messages) {
  std::vector<char *> list;
  for (const std::string &w : words) list.push_back((char *)w.c_str());
  list.push_back(nullptr);
  const pid_t child = vfork();
  if (child < 0) return -1;
  if (child == 0) {
    if (!freopen(messages.c_str(), "w", stderr)) _exit(126);
    execvp(list[0], list.data());
    _exit(127);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* ====== Compiling ====== */

/* An option of NVRTC's as the host's compiler has it; "" for those without a meaning here.  False: unknown. */
bool translate_option(const std::string &o, std::vector<std::string> *to) {
  static const char *const ignored[] = {"--gpu-architecture",
                                        "-arch",
                                        "--use_fast_math",
                                        "-use_fast_math",
                                        "--fmad",
                                        "-fmad",
                                        "--restrict",
                                        "-lineinfo",
                                        "--generate-line-info",
                                        "--device-debug",
                                        "-G",
                                        "--extra-device-vectorization",
                                        "-default-device",
                                        "--maxrregcount",
                                        "--ftz",
                                        "--prec-div",
                                        "--prec-sqrt",
                                        "-dopt",
                                        "--disable-warnings",
                                        "-w"};
  if (o.compare(0, 2, "-D") == 0 || o.compare(0, 2, "-I") == 0 || o.compare(0, 2, "-U") == 0) {
    to->push_back(o);
    return true;
  }
  if (o.compare(0, 16, "--define-macro=") == 0) {
    to->push_back("-D" + o.substr(15));
    return true;
  }
  if (o.compare(0, 15, "--include-path=") == 0) {
    to->push_back("-I" + o.substr(15));
    return true;
  }
  if (o.compare(0, 5, "-std=") == 0 || o.compare(0, 6, "--std=") == 0) return true;
  for (const char *one : ignored)
    if (o.compare(0, strlen(one), one) == 0) return true;
  return false;
}

/* "name:3:7: error: text" becomes "name(3): error: text"; lines that speak of the table or of includes go. */
std::string nvrtc_style(const std::string &text) {
  static const std::regex place("^(.+?):([0-9]+):[0-9]+: (fatal error|error|warning|note): ");
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const size_t end = std::min(text.find('\n', i), text.size());
    const std::string line = text.substr(i, end - i);
    out += std::regex_replace(line, place, "$1($2): $3: ") + "\n";
    i = end + 1;
  }
  return out;
}

nvrtcResult compile(nvrtcProgram p, const std::vector<std::string> &options, const std::string &folder) {
  for (const auto &h : p->headers)
    if (h.first.find("..") != std::string::npos || h.first.find('/') != std::string::npos ||
        !write_file(folder + "/" + h.first, h.second))
      return NVRTC_ERROR_INVALID_INPUT;
  const std::string unit = folder + "/unit.cpp", object = folder + "/unit.so", messages = folder + "/messages";
  if (!write_file(unit, unit_of(p))) return NVRTC_ERROR_INTERNAL_ERROR;
  const char *const chosen = getenv("HALFMOON_EMU_CXX");
  std::vector<std::string> words = {chosen && *chosen ? chosen : HM_EMU_CXX,
                                    "-std=c++17",
                                    "-O1",
                                    "-fPIC",
                                    "-shared",
                                    "-fvisibility=hidden",
                                    "-fno-gnu-unique",
                                    "-ffp-contract=off",
                                    "-fno-math-errno",
                                    "-fdiagnostics-color=never",
                                    "-fno-diagnostics-show-caret",
                                    "-w",
                                    "-I" + folder,
                                    "-I" HM_EMU_INCLUDE};
  words.insert(words.end(), options.begin(), options.end());
  words.insert(words.end(), {unit, "-o", object});
  const int status = run(words, messages);
  std::string said;
  read_file(messages, &said);
  p->log = nvrtc_style(said);
  if (status == 127) p->log += "there is no compiler named " + words[0] + "\n";
  if (status != 0) return NVRTC_ERROR_COMPILATION;
  std::string image;
  if (!read_file(object, &image)) return NVRTC_ERROR_INTERNAL_ERROR;
  p->image = "HMEMU " + std::to_string(image.size()) + "\n" + image;
  p->compiled = true;
  return NVRTC_SUCCESS;
}

void remove_folder(const std::string &folder, nvrtcProgram p) {
  for (const auto &h : p->headers) unlink((folder + "/" + h.first).c_str());
  for (const char *name : {"unit.cpp", "unit.so", "messages"}) unlink((folder + "/" + name).c_str());
  rmdir(folder.c_str());
}

} // namespace

} // namespace hm_emu

using namespace hm_emu;

const char *nvrtcGetErrorString(nvrtcResult result) {
  switch (result) {
#define X(name)                                                                                                        \
  case name: return #name;
    X(NVRTC_SUCCESS)
    X(NVRTC_ERROR_OUT_OF_MEMORY)
    X(NVRTC_ERROR_PROGRAM_CREATION_FAILURE)
    X(NVRTC_ERROR_INVALID_INPUT)
    X(NVRTC_ERROR_INVALID_PROGRAM)
    X(NVRTC_ERROR_INVALID_OPTION)
    X(NVRTC_ERROR_COMPILATION)
    X(NVRTC_ERROR_BUILTIN_OPERATION_FAILURE)
    X(NVRTC_ERROR_NO_NAME_EXPRESSIONS_AFTER_COMPILATION)
    X(NVRTC_ERROR_NO_LOWERED_NAMES_BEFORE_COMPILATION)
    X(NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID)
    X(NVRTC_ERROR_INTERNAL_ERROR)
#undef X
  }
  return "NVRTC_ERROR unknown";
}

nvrtcResult nvrtcVersion(int *major, int *minor) {
  if (!major || !minor) return NVRTC_ERROR_INVALID_INPUT;
  *major = CUDART_VERSION / 1000;
  *minor = CUDART_VERSION % 1000 / 10;
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcCreateProgram(nvrtcProgram *prog, const char *src, const char *name, int numHeaders,
                               const char *const *headers, const char *const *includeNames) {
  call entered("nvrtcCreateProgram");
  if (entered.injected) return NVRTC_ERROR_PROGRAM_CREATION_FAILURE;
  if (!prog || !src || numHeaders < 0 || (numHeaders && (!headers || !includeNames))) return NVRTC_ERROR_INVALID_INPUT;
  const nvrtcProgram p = new _nvrtcProgram{src, name && *name ? name : "default_program", "", "", {}, {}, false};
  for (int i = 0; i < numHeaders; i++) p->headers[includeNames[i]] = headers[i];
  programs.insert(p);
  stats.live_objects++;
  *prog = p;
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcDestroyProgram(nvrtcProgram *prog) {
  call entered("nvrtcDestroyProgram");
  if (!prog || !programs.erase(*prog)) return NVRTC_ERROR_INVALID_PROGRAM;
  stats.live_objects--;
  delete *prog;
  *prog = nullptr;
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcCompileProgram(nvrtcProgram prog, int numOptions, const char *const *options) {
  call entered("nvrtcCompileProgram");
  if (entered.injected) return NVRTC_ERROR_INTERNAL_ERROR;
  if (!programs.count(prog)) return NVRTC_ERROR_INVALID_PROGRAM;
  std::vector<std::string> list;
  for (int i = 0; i < numOptions; i++) {
    if (translate_option(options[i], &list)) continue;
    prog->log = std::string("unrecognized option ") + options[i] + " found\n";
    return NVRTC_ERROR_INVALID_OPTION;
  }
  const char *const top = getenv("TMPDIR");
  std::string folder = std::string(top && *top ? top : "/tmp") + "/halfmoon-emu-XXXXXX";
  if (!mkdtemp(folder.data())) return NVRTC_ERROR_INTERNAL_ERROR;
  const nvrtcResult result = compile(prog, list, folder);
  remove_folder(folder, prog);
  return result;
}

nvrtcResult nvrtcGetPTXSize(nvrtcProgram prog, size_t *ptxSizeRet) {
  if (!programs.count(prog) || !prog->compiled || !ptxSizeRet) return NVRTC_ERROR_INVALID_PROGRAM;
  *ptxSizeRet = prog->image.size() + 1;
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetPTX(nvrtcProgram prog, char *ptx) {
  if (!programs.count(prog) || !prog->compiled || !ptx) return NVRTC_ERROR_INVALID_PROGRAM;
  memcpy(ptx, prog->image.c_str(), prog->image.size() + 1);
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetCUBINSize(nvrtcProgram prog, size_t *cubinSizeRet) { return nvrtcGetPTXSize(prog, cubinSizeRet); }
nvrtcResult nvrtcGetCUBIN(nvrtcProgram prog, char *cubin) { return nvrtcGetPTX(prog, cubin); }

nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram prog, size_t *logSizeRet) {
  if (!programs.count(prog) || !logSizeRet) return NVRTC_ERROR_INVALID_PROGRAM;
  *logSizeRet = prog->log.size() + 1;
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetProgramLog(nvrtcProgram prog, char *log) {
  if (!programs.count(prog) || !log) return NVRTC_ERROR_INVALID_PROGRAM;
  memcpy(log, prog->log.c_str(), prog->log.size() + 1);
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcAddNameExpression(nvrtcProgram prog, const char *const name_expression) {
  if (!programs.count(prog)) return NVRTC_ERROR_INVALID_PROGRAM;
  if (prog->compiled) return NVRTC_ERROR_NO_NAME_EXPRESSIONS_AFTER_COMPILATION;
  prog->expressions.push_back(name_expression);
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetLoweredName(nvrtcProgram prog, const char *const name_expression, const char **lowered_name) {
  if (!programs.count(prog)) return NVRTC_ERROR_INVALID_PROGRAM;
  if (!prog->compiled) return NVRTC_ERROR_NO_LOWERED_NAMES_BEFORE_COMPILATION;
  static std::set<std::string> names; /* pointers stay good */
  for (size_t i = 0; i < prog->expressions.size(); i++) {
    if (prog->expressions[i] != name_expression) continue;
    *lowered_name = names.insert(lowered(i)).first->c_str();
    return NVRTC_SUCCESS;
  }
  return NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID;
}
